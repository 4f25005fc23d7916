from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe.config import ModelConfig
from moe.generation import NonFiniteLogitsError, beam_search, generate, stream
from moe.model import Transformer

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]


@pytest.fixture(params=["dense", "sparse"])
def model(request: pytest.FixtureRequest, model_config: Callable[..., ModelConfig]) -> Transformer:
    model = Transformer(model_config(sparse=request.param == "sparse"), dtype=torch.float64)
    model.reset_parameters(seed=0)
    with torch.no_grad():  # flat logits would make every choice a coin toss
        model.embedding.weight.mul_(20)
    return model


def greedy(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Without a cache: the whole sequence again for each token."""
    tokens = list(prompt)
    model.eval()
    for _ in range(count):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_with_cache_and_padding_equals_greedy_without(model: Transformer) -> None:
    expected = [greedy(model, prompt, 8) for prompt in PROMPTS]
    assert len({tuple(row) for row in expected}) > 1
    assert generate(model, PROMPTS, 8) == expected


def test_shorter_prompts_are_padded_and_equal_ones_are_not(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    padding = []
    made = model.new_cache
    monkeypatch.setattr(model, "new_cache", lambda *args: padding.append(args[2]) or made(*args))
    generate(model, PROMPTS, 2)
    generate(model, PROMPTS[:1] * 2, 2)
    assert [None if each is None else each.tolist() for each in padding] == [[2, 4, 0], None]


def test_samples_do_not_depend_on_the_other_prompts(model: Transformer) -> None:
    together = generate(model, PROMPTS, 8, temperature=1.0, seed=3)
    assert generate(model, PROMPTS[:1], 8, temperature=1.0, seed=3) == together[:1]
    assert generate(model, PROMPTS, 8, temperature=1.0, seed=4) != together


def test_generation_stops_at_the_separator(model: Transformer) -> None:
    whole = generate(model, PROMPTS, 8)
    eos = whole[0][3]
    stopped = generate(model, PROMPTS, 8, eos_id=eos)
    assert stopped == [row[: row.index(eos)] if eos in row else row for row in whole]


def test_a_tiny_nucleus_is_greedy(model: Transformer) -> None:
    assert generate(model, PROMPTS, 8, temperature=1.0, top_p=1e-6) == generate(model, PROMPTS, 8)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-50])
def test_a_tiny_temperature_is_greedy(model: Transformer, temperature: float) -> None:
    assert generate(model, PROMPTS, 8, temperature=temperature) == generate(model, PROMPTS, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, r"temperature \(-1\.0\) must be a number of at least 0"),
        ({"temperature": float("nan")}, r"temperature \(nan\)"),
        ({"temperature": float("inf")}, r"temperature \(inf\)"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p \(0\.0\) must be above 0 and at most 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p \(1\.5\)"),
        ({"temperature": 1.0, "top_p": float("nan")}, r"top_p \(nan\)"),
        ({"temperature": 1.0, "seed": 1 << 44}, r"seed \(17592186044416\) must be from 0 to 17592186044415"),
        ({"temperature": 1.0, "seed": -1}, r"seed \(-1\)"),
    ],
)
def test_draws_without_meaning_are_refused(model: Transformer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model, PROMPTS, 2, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_said_to_have(model: Transformer, temperature: float) -> None:
    assert model.final_norm is not None
    torch.nn.init.constant_(model.final_norm.weight, float("nan"))
    with pytest.raises(NonFiniteLogitsError, match="it has diverged"):
        generate(model, [[1, 2]], 3, temperature=temperature)
    with pytest.raises(NonFiniteLogitsError, match="it has diverged"):
        beam_search(model, [[1, 2]], 3, num_beams=2)


@pytest.mark.parametrize("count", [0, -3])
def test_less_than_one_token_is_refused(model: Transformer, count: int) -> None:
    with pytest.raises(ValueError, match=rf"max_new_tokens \({count}\) must be at least 1"):
        generate(model, PROMPTS, count)
    with pytest.raises(ValueError, match=rf"max_new_tokens \({count}\) must be at least 1"):
        beam_search(model, PROMPTS, count, num_beams=2)


def test_the_largest_seed_draws(model: Transformer) -> None:
    assert len(generate(model, PROMPTS, 2, temperature=1.0, seed=(1 << 44) - 1)) == 3


def test_sampling_follows_the_nucleus(model_config: Callable[..., ModelConfig]) -> None:
    """Frequencies of many one-token draws equal the renormalised probabilities of the nucleus."""
    model = Transformer(model_config(vocab_size=5), dtype=torch.float64)
    model.reset_parameters(seed=2)
    with torch.no_grad():
        model.embedding.weight.mul_(12)
    probs = model.eval()(torch.tensor([[1]])).logits[0, -1].softmax(0)
    ordered, ids = probs.sort(descending=True)
    nucleus = ids[: int((ordered.cumsum(0) < 0.8).sum()) + 1]
    draws = torch.tensor(generate(model, [[1]] * 4000, 1, temperature=1.0, top_p=0.8)).flatten()
    frequency = torch.bincount(draws, minlength=5) / len(draws)
    expected = torch.zeros(5, dtype=torch.float64)
    expected[nucleus] = probs[nucleus].detach() / probs[nucleus].sum().detach()
    assert 1 < len(nucleus) < 5
    torch.testing.assert_close(frequency.double(), expected, rtol=0, atol=0.04)


def test_streaming_yields_the_same_tokens(model: Transformer) -> None:
    columns = list(stream(model, PROMPTS, 5))
    assert [list(row) for row in zip(*columns, strict=True)] == generate(model, PROMPTS, 5)


def test_generation_leaves_the_mode_alone(model: Transformer) -> None:
    model.train()
    generate(model, PROMPTS, 2)
    assert model.training


def test_empty_prompts_are_refused(model: Transformer) -> None:
    for prompts in ([], [[1], []]):
        with pytest.raises(ValueError, match="at least one token"):
            generate(model, prompts, 2)


def test_positions_beyond_the_table_are_refused(model_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(model_config(position="learned"))
    with pytest.raises(ValueError, match=r"3 prompt tokens and 22 new ones exceed model\.max_seq_len \(24\)"):
        generate(model, [[1, 2, 3]], 22)


def test_a_token_outside_the_vocabulary_is_refused(model: Transformer) -> None:
    for token in (37, -1):
        with pytest.raises(ValueError, match=rf"prompt 1 holds the token {token}, outside"):
            generate(model, [[1], [2, token]], 2)


def test_of_a_prompt_the_last_logits_alone_are_computed(model: Transformer) -> None:
    tokens = torch.tensor(PROMPTS[0])[None]
    last = model(tokens, last_only=True).logits
    assert last.shape == (1, 1, 37)
    torch.testing.assert_close(last[:, 0], model(tokens).logits[:, -1])
    with pytest.raises(ValueError, match="last_only"):
        model(tokens, tokens, last_only=True)
