"""The text samples of a finished run."""

from __future__ import annotations

from moe.config import EvalConfig
from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.generation import NonFiniteLogitsError, continue_texts, encode_prompt
from moe.model import Transformer


def sample_texts(
    model: Transformer, tokenizer: Tokenizer, config: EvalConfig, *, seed: int, world: World | None = None
) -> list[str]:
    """One sample per prompt, headed by it; a collective call.

    Samples end where the model's positions do. Where there can be no text, the sample says why instead of failing: by
    now the run is trained and scored, and keeps its figures.
    """
    prompts = config.prompts or [""]
    rooms = [_room(model, tokenizer, prompt, config.sample_tokens) for prompt in prompts]
    fitting = [prompt for prompt, room in zip(prompts, rooms, strict=True) if room > 0]
    found: list[str] = []
    if fitting:
        new_tokens = min(room for room in rooms if room > 0)
        temperature, top_p = config.temperature, config.top_p
        try:
            found = continue_texts(
                model, tokenizer, fitting, new_tokens, temperature=temperature, top_p=top_p, seed=seed, world=world
            )
        except NonFiniteLogitsError as error:
            found = [f" [no text: {error}]"] * len(fitting)
    too_long = f" [no text: the prompt takes all {model.config.max_seq_len} positions of the model]"
    texts = iter(found)
    return [
        f"=== {prompt!r}\n{prompt}{next(texts) if room > 0 else too_long}"
        for prompt, room in zip(prompts, rooms, strict=True)
    ]


def _room(model: Transformer, tokenizer: Tokenizer, prompt: str, wanted: int) -> int:
    """How many of the wanted tokens the model has positions for."""
    if model.config.position == "rope":
        return wanted
    return min(wanted, model.config.max_seq_len - len(encode_prompt(tokenizer, prompt)))
