"""Text from a model: greedy or sampled, one prompt or many, with a key-value cache, streamed token by token."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.model import Transformer


def generate(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    world: World | None = None,
) -> list[list[int]]:
    """The new tokens of each prompt, `eos_id` left out. See `stream` for the arguments and errors."""
    results: list[list[int]] = [[] for _ in prompts]
    for tokens in stream(
        model, prompts, max_new_tokens, eos_id=eos_id, temperature=temperature, top_p=top_p, seed=seed, world=world
    ):
        for result, token in zip(results, tokens, strict=True):
            if token is not None:
                result.append(token)
    return results


@torch.no_grad()
def stream(
    model: Transformer,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    eos_id: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    world: World | None = None,
) -> Iterator[list[int | None]]:
    """Yield, position by position, the next token of every prompt; None for a prompt that has met `eos_id`.

    prompts: token ids, each at least one, of any lengths. temperature 0 is greedy; otherwise tokens are drawn
    from the smallest set whose probability reaches `top_p` (nucleus sampling, Holtzman et al. 2020). Row i draws
    from a generator of its own seeded by (seed, i), so it does not depend on the other prompts' lengths. world: ranks
    that share the model; all of them must call with the same arguments, and all go on with what rank 0 chooses.
    Raises ValueError for an empty prompt, or more positions than a model without rotary positions has.
    """
    _check(model, prompts, max_new_tokens)
    device = model.embedding.weight.device if world is None else world.device
    was_training = model.training
    model.eval()
    longest = max(map(len, prompts))
    shorter = [longest - len(prompt) for prompt in prompts]
    padding = torch.tensor(shorter, device=device) if any(shorter) else None  # without any, less is masked
    rows = [[prompt[0]] * (longest - len(prompt)) + prompt for prompt in prompts]  # padding is masked: any id does
    tokens = torch.tensor(rows, device=device)  # (B, S)
    cache = model.new_cache(len(prompts), longest + max_new_tokens, padding)
    generators = [torch.Generator().manual_seed((seed << 20) + row) for row in range(len(prompts))]
    running = [True] * len(prompts)
    try:
        for _ in range(max_new_tokens):
            logits = model(tokens, cache=cache).logits[:, -1]  # (B, V)
            chosen = _choose(logits.float().cpu(), temperature, top_p, generators)
            if world is not None:  # equal rows may round differently on another rank, and all must stop together
                chosen = world.same_as_first(torch.tensor(chosen, device=device)).tolist()
            running = [alive and token != eos_id for alive, token in zip(running, chosen, strict=True)]
            if not any(running):
                return
            yield [token if alive else None for token, alive in zip(chosen, running, strict=True)]
            tokens = torch.tensor(chosen, device=device)[:, None]
    finally:
        model.train(was_training)


def _choose(logits: Tensor, temperature: float, top_p: float, generators: list[torch.Generator]) -> list[int]:
    """One token per row of (B, V) float32 logits."""
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    probs, order = (logits / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probs.cumsum(dim=-1) - probs  # probability of all likelier tokens: the likeliest one always stays
    probs = torch.where(before < top_p, probs, 0.0)
    rows = [torch.multinomial(row, 1, generator=generator) for row, generator in zip(probs, generators, strict=True)]
    return order.gather(1, torch.stack(rows)).flatten().tolist()


def _check(model: Transformer, prompts: list[list[int]], max_new_tokens: int) -> None:
    if not prompts or not all(prompts):
        raise ValueError("every prompt needs at least one token; begin an empty one with the document separator")
    longest = max(map(len, prompts))
    config = model.config
    if config.position != "rope" and longest + max_new_tokens > config.max_seq_len:
        raise ValueError(
            f"{longest} prompt tokens and {max_new_tokens} new ones exceed model.max_seq_len ({config.max_seq_len}), "
            f"and position={config.position} has no positions beyond it; shorten one of them"
        )


def continue_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    world: World | None = None,
) -> list[str]:
    """The continuation of each prompt as text. A prompt begins a document: the separator stands before it."""
    tokens = generate(
        model,
        [[tokenizer.eos_id, *tokenizer.encode(prompt)] for prompt in prompts],
        max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        world=world,
    )
    return [tokenizer.decode(row) for row in tokens]


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of one prompt, piece by piece, never half a character."""
    decoder = tokenizer.stream_decoder()
    for (token,) in stream(
        model,
        [[tokenizer.eos_id, *tokenizer.encode(prompt)]],
        max_new_tokens,
        eos_id=tokenizer.eos_id,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    ):
        assert token is not None  # a single row ends the stream instead
        yield decoder.add(token)
    yield decoder.finish()
