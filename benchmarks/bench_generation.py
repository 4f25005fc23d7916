"""One step of generation with a key-value cache: a token for each sequence of a batch. Bound by bytes, not by FLOPs."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.model import Transformer

from . import counts, models
from .contender import Contender
from .suite import Ratio, Suite


@pytest.mark.parametrize("batch", [1, 16])
def bench_generation_step(batch: int, suite: Suite) -> None:
    small = suite.options.small
    config = models.small_olmoe(small=small)
    context = 32 if small else 256
    model = models.our_model(config, suite.device).eval()
    prompt = torch.randint(config.vocab_size or 0, (batch, context), device=suite.device)
    step, busy = _our_step(model, prompt)
    cost = counts.decode_cost(config, batch, context, num_busy_experts=busy)
    contenders = [Contender("ours", step, cost, outcome=_logits)]
    if importlib.util.find_spec("transformers") is not None:
        for implementation in ("grouped_mm", "eager"):
            theirs = models.transformers_olmoe(model, implementation).eval()
            name = f"transformers {implementation}"
            contenders.append(Contender(name, _their_step(theirs, prompt), cost, outcome=_logits, peer=True))
        contenders[0] = replace(contenders[0], reference=contenders[1])
        contenders[1] = replace(contenders[1], unchecked="the reference")
        contenders[2] = replace(contenders[2], reference=contenders[1])
    suite.run(
        f"generation step, OLMoE in small, {batch} sequences of {context} tokens",
        contenders,
        ratios=[Ratio("ours [fp32]", f"transformers {each} [fp32]") for each in ("grouped_mm", "eager")],
    )


def _logits(logits: Tensor, _: Any) -> Mapping[str, Tensor]:
    return {"logits": logits}


def _our_step(model: Transformer, prompt: Tensor) -> tuple[Callable[[], Tensor], int]:
    """The last token of the prompt, again and again; and how many experts it keeps busy in the busiest layer."""
    batch, length = prompt.shape
    with torch.inference_mode():
        cache = model.new_cache(batch, length)
        model(prompt[:, :-1], cache=cache)

    def step() -> Tensor:
        with torch.inference_mode():
            cache.length = length - 1
            logits = model(prompt[:, -1:], cache=cache).logits
        assert logits is not None
        return logits[:, -1]

    with torch.inference_mode():
        cache.length = length - 1
        routings = model(prompt[:, -1:], cache=cache).routings
    return step, max(int((routing.tokens_per_expert > 0).sum()) for routing in routings)


def _their_step(model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    renamed = "cache" in inspect.signature(model.forward).parameters  # transformers 5.24; "past_key_values" before
    name = "cache" if renamed else "past_key_values"
    with torch.inference_mode():
        cache = getattr(model(input_ids=prompt[:, :-1], use_cache=True), name)

    def step() -> Tensor:
        with torch.inference_mode():
            output = model(input_ids=prompt[:, -1:], use_cache=True, **{name: cache})
            cache.crop(-1)
        return output.logits[:, -1]

    return step
