"""Token generation: greedy or sampled, for one or many prompts, with a key-value cache, position by position."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from moe.distributed.world import World
from moe.generation.decode_step import decode_step
from moe.generation.end_tokens import EosId, as_set
from moe.model import KeyValueCache, Transformer

_ROW_BITS = 20  # of a generator's 64-bit seed
_SEEDS = 1 << (64 - _ROW_BITS)

Ended = Callable[[int, int], bool]  # (row, its new token) -> whether the row ends with it


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_id: EosId = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ended: Ended | None = None,
    world: World | None = None,
) -> list[list[int]]:
    """Return the new tokens of each prompt, without the end token. See `stream` for the arguments and errors."""
    results: list[list[int]] = [[] for _ in prompts]
    options: dict[str, Any] = {"eos_id": eos_id, "temperature": temperature, "top_p": top_p, "seed": seed}
    for tokens in stream(model, prompts, max_new_tokens, ended=ended, world=world, **options):
        for result, token in zip(results, tokens, strict=True):
            if token is not None:
                result.append(token)
    return results


class NonFiniteLogitsError(ValueError):
    """The model's logits are NaN or infinite where a next token must be chosen."""


DIVERGED = "the model's logits are not finite: it has diverged and has no next token; take an earlier checkpoint"


@torch.no_grad()
def stream(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_id: EosId = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    ended: Ended | None = None,
    world: World | None = None,
) -> Iterator[list[int | None]]:
    """Yield, position by position, the next token of every prompt; None for a prompt that has ended.

    prompts: token ids, at least one each, of any lengths. temperature 0 is greedy; otherwise tokens are drawn from the
    smallest set whose probability reaches `top_p` (nucleus sampling, Holtzman et al. 2020). Row i has its own
    generator, seeded by (seed, i), so its draws do not depend on the other prompts' lengths. A row ends before
    `eos_id` (any of them, if several), or with the token for which `ended` returns True (stop strings); `ended` is
    called once per yielded token, before the yield. world: ranks that share the model; all must call with the same
    arguments, and all follow rank 0's choices. Raises ValueError, before the first token, for an empty prompt, an
    unknown token, max_new_tokens below 1, more positions than a model without rotary positions has, and as
    `check_sampling` does; NonFiniteLogitsError if rank 0's logits are NaN or infinite.
    """
    check_prompts(model, prompts, max_new_tokens)
    check_sampling(temperature, top_p, seed)
    ends_text = as_set(eos_id)
    device = model.embedding.weight.device if world is None else world.device
    was_training = model.training
    model.eval()
    try:
        tokens, padding = left_padded(prompts, device)
        cache = model.new_cache(len(prompts), tokens.shape[1] + max_new_tokens, padding)
        generators = [torch.Generator().manual_seed((seed << _ROW_BITS) + row) for row in range(len(prompts))]
        running = [True] * len(prompts)
        step = None
        for _ in range(max_new_tokens):
            if step is None:
                logits = prefill(model, tokens, cache)
                step = decode_step(model, cache, max_new_tokens - 1, world)
            else:
                logits = step(tokens)  # (B, V)
            chosen = _choose(logits.float().cpu(), temperature, top_p, generators)
            if world is not None:  # equal rows may round differently on another rank, and all must stop together
                chosen = world.same_as_first(torch.tensor(chosen, device=device)).tolist()
            if chosen[0] < 0:  # checked after the broadcast, so that all ranks raise
                raise NonFiniteLogitsError(DIVERGED)
            running = [alive and token not in ends_text for alive, token in zip(running, chosen, strict=True)]
            if not any(running):
                return
            ends = [
                ended is not None and alive and ended(row, token)
                for row, (alive, token) in enumerate(zip(running, chosen, strict=True))
            ]
            yield [token if alive else None for token, alive in zip(chosen, running, strict=True)]
            running = [alive and not end for alive, end in zip(running, ends, strict=True)]
            if not any(running):
                return
            tokens = torch.tensor(chosen, device=device)
    finally:
        model.train(was_training)


def left_padded(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Left-padded tokens (B, S) and the padding per row (B,), None if there is none, which saves a mask."""
    longest = max(map(len, prompts))
    shorter = [longest - len(prompt) for prompt in prompts]
    rows = [[prompt[0]] * (longest - len(prompt)) + prompt for prompt in prompts]  # padding is masked: any id will do
    padding = torch.tensor(shorter, device=device) if any(shorter) else None
    return torch.tensor(rows, device=device), padding


def prefill(model: Transformer, tokens: Tensor, cache: KeyValueCache) -> Tensor:
    """Read the prompts (B, S) into an empty cache; return the logits after their last tokens (B, V)."""
    return model(tokens, cache=cache, last_only=True).logits[:, -1]


def _choose(logits: Tensor, temperature: float, top_p: float, generators: Sequence[torch.Generator]) -> list[int]:
    """One token per row of (B, V) float32 logits; -1 for every row if any logits are not finite."""
    if not logits.amax(dim=-1).isfinite().all():
        return [-1] * logits.shape[0]
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    # the maximum becomes 0 at any temperature and no quotient is inf - inf; float32 has no divisor below `tiny`
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, torch.finfo(torch.float32).tiny)
    probs, order = scaled.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens: the likeliest token always stays
    probs = torch.where(before < top_p, probs, 0.0)
    rows = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probs, generators, strict=True)]
    return order.gather(1, torch.stack(rows)).flatten().tolist()


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Raise ValueError for invalid sampling settings."""
    if not (math.isfinite(temperature) and temperature >= 0.0):
        raise ValueError(f"temperature ({temperature}) must be a number of at least 0; 0 is greedy")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(
            f"top_p ({top_p}) must be above 0 and at most 1, which leaves all tokens; greedy is temperature 0"
        )
    if not 0 <= seed < _SEEDS:
        raise ValueError(f"seed ({seed}) must be from 0 to {_SEEDS - 1}")


def check_prompts(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise ValueError for prompts that cannot be continued."""
    if not prompts or not all(prompts):
        row = next((row for row, prompt in enumerate(prompts) if not prompt), None)
        which = "there is no prompt" if row is None else f"prompt {row} is empty"
        raise ValueError(f"{which}, and every prompt needs at least one token; begin with the document separator")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens ({max_new_tokens}) must be at least 1")
    config = model.config
    assert config.vocab_size is not None
    for row, prompt in enumerate(prompts):
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            token = max(prompt) if min(prompt) >= 0 else min(prompt)
            raise ValueError(
                f"prompt {row} holds the token {token}, outside the model's vocabulary of {config.vocab_size}: "
                f"encode it with the model's own tokenizer"
            )
    longest = max(map(len, prompts))
    if config.position != "rope" and longest + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed model.max_seq_len ({config.max_seq_len}), "
            f"and position={config.position} has no positions beyond it; shorten the prompt or lower max_new_tokens"
        )
