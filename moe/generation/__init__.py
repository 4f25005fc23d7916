"""Text generation: greedy, sampled or by beam search, with a key-value cache, streamed token by token."""

from __future__ import annotations

from moe.generation.beam import Beam, beam_search
from moe.generation.end_tokens import EosId, find_end_ids
from moe.generation.text import StoppedText, continue_texts, encode_prompt, stream_text
from moe.generation.tokens import NonFiniteLogitsError, check_sampling, generate, stream

__all__ = [
    "Beam",
    "EosId",
    "NonFiniteLogitsError",
    "StoppedText",
    "beam_search",
    "check_sampling",
    "continue_texts",
    "encode_prompt",
    "find_end_ids",
    "generate",
    "stream",
    "stream_text",
]
