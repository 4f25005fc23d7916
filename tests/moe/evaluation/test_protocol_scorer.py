from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.evaluation.scorer import Request, ScoreReport, score
from moe.model import Transformer

VOCABULARY = 37
ROUNDING = 1e-5  # relative, of float32 log-probabilities that other batches were made of


def model_of(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Transformer:
    model = Transformer(config, dtype=dtype)
    model.reset_parameters(seed=3)
    return model.eval()


def requests_of(num: int, longest: int, seed: int = 0) -> list[Request]:
    """Sequences of many lengths, some of them asked for twice, from other tokens on."""
    rng = random.Random(seed)
    requests = []
    for i in range(num):
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(2, longest))]
        requests.append(Request(tokens, rng.randint(1, len(tokens) - 1)))
        if i % 3 == 0:
            requests.append(Request(tokens, rng.randint(1, len(tokens) - 1)))
    return requests


def one_by_one(model: Transformer, request: Request) -> tuple[Tensor, Tensor]:
    """Log-probabilities and greedy flags of one request, in a pass of its own."""
    tokens = torch.tensor(request.tokens)
    logits = model(tokens[None, :-1]).logits[0].detach()
    wanted = tokens[request.start :]
    rows = logits[request.start - 1 :].double().log_softmax(-1)
    return rows[torch.arange(len(wanted)), wanted], rows.argmax(-1) == wanted


def values_of(report: ScoreReport) -> Tensor:
    return torch.tensor([value for each in report.scores for value in each.log_probs], dtype=torch.float64)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("greedy", [False, True])
def test_scores_are_those_of_each_sequence_alone(
    model_config: Callable[..., ModelConfig], sparse: bool, greedy: bool
) -> None:
    model = model_of(model_config(sparse=sparse), torch.float64)
    requests = requests_of(12, 20)
    report = score(model.train(), requests, greedy=greedy, batch_tokens=50)
    assert model.training
    model.eval()
    for request, answer in zip(requests, report.scores, strict=True):
        log_probs, likeliest = one_by_one(model, request)
        torch.testing.assert_close(torch.tensor(answer.log_probs, dtype=torch.float64), log_probs)
        assert answer.greedy == (tuple(likeliest.tolist()) if greedy else None)
    assert report.num_truncated == 0
    assert report.dropped_fraction == 0.0
    assert report.num_forward_tokens == sum(len(tokens) - 1 for tokens in {tuple(each.tokens) for each in requests})


def test_greedy_flags_find_what_the_model_would_say(model_config: Callable[..., ModelConfig]) -> None:
    model = model_of(model_config())
    tokens = [5]
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % VOCABULARY]
    right, other = score(model, [Request(tokens, 1), Request(wrong, 1)], greedy=True).scores
    assert right.greedy == (True,) * 6
    assert other.greedy == (True,) * 5 + (False,)


def test_the_order_of_requests_changes_no_bit(
    model_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(model_config(sparse=True))
    requests = [*requests_of(15, 20), *(Request([i, 3, 7, 1], 1) for i in range(20))]
    batches: list[list[list[int]]] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda tokens, *a, **k: batches.append(tokens.tolist()) or forward(tokens, *a, **k)
    )
    there = score(model, requests, batch_tokens=64).scores
    before, batches[:] = list(batches), []
    back = score(model, requests[::-1], batch_tokens=64).scores
    assert there == back[::-1]
    assert batches == before  # and no other matrix was multiplied


def test_batches_change_only_the_rounding(model_config: Callable[..., ModelConfig]) -> None:
    model = model_of(model_config(sparse=True))
    requests = requests_of(15, 20)
    reference = values_of(score(model, requests, batch_tokens=1))  # each alone
    for batch_tokens in (30, 100, 8192):
        values = values_of(score(model, requests, batch_tokens=batch_tokens))
        assert (values - reference).abs().max() <= ROUNDING * reference.abs().max()


def test_batches_hold_their_tokens_and_hide_padding(
    model_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(model_config())
    shapes: list[tuple[int, ...]] = []
    num_real = 0
    forward = model.forward

    def watch(tokens: Tensor, *arguments: Any, token_mask: Tensor | None, **options: Any) -> Any:
        nonlocal num_real
        shapes.append(tokens.shape)
        num_real += tokens.numel() if token_mask is None else int(token_mask.sum())
        return forward(tokens, *arguments, token_mask=token_mask, **options)

    monkeypatch.setattr(model, "forward", watch)
    report = score(model, requests_of(15, 20), batch_tokens=40)
    assert max(rows * width for rows, width in shapes) <= 40
    assert max(rows for rows, _ in shapes) > 1
    assert num_real == report.num_forward_tokens < sum(rows * width for rows, width in shapes)
    shapes.clear()
    score(model, requests_of(5, 20), batch_tokens=1)
    assert {rows for rows, _ in shapes} == {1}


def test_expert_places_are_not_shared_with_batch_mates(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True)
    assert config.moe is not None
    tight = replace(config, moe=replace(config.moe, eval_capacity_factor=0.6))
    model = model_of(tight, torch.float64)
    requests = requests_of(8, 20)
    report = score(model, requests, batch_tokens=8192)
    expected = torch.cat([one_by_one(model, request)[0] for request in requests])
    torch.testing.assert_close(values_of(report), expected)
    assert 0.1 < report.dropped_fraction < 0.6
    assert score(model, [], batch_tokens=10) == ScoreReport([], 0, 0.0, 0)


def test_what_does_not_fit_loses_its_first_tokens(model_config: Callable[..., ModelConfig]) -> None:
    model = model_of(model_config(max_seq_len=8), torch.float64)
    tokens = [i % VOCABULARY for i in range(3, 17)]
    report = score(model, [Request(tokens, 10), Request(tokens[:9], 1)])
    assert report.num_truncated == 1
    expected, _ = one_by_one(model, Request(tokens[-9:], 5))
    torch.testing.assert_close(torch.tensor(report.scores[0].log_probs, dtype=torch.float64), expected)
    assert len(report.scores[1].log_probs) == 8
    with pytest.raises(ValueError, match=r"request 0 asks for 9 tokens, more than model.max_seq_len \(8\)"):
        score(model, [Request(tokens, 5)])


@pytest.mark.parametrize(
    ("tokens", "start", "message"),
    [
        ([1, 2, 3], 0, "request 1 asks for the tokens from 0 on of 3"),
        ([1, 2, 3], 3, "request 1 asks for the tokens from 3 on of 3"),
        ([], 1, "request 1 asks for the tokens from 1 on of 0"),
        ([1, VOCABULARY], 1, f"request 1 holds the token {VOCABULARY}, which is outside .* vocabulary of {VOCABULARY}"),
        ([1, -1], 1, "request 1 holds the token -1"),
    ],
)
def test_requests_that_make_no_sense(
    model_config: Callable[..., ModelConfig], tokens: list[int], start: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        score(model_of(model_config()), [Request([1, 2], 1), Request(tokens, start)])
    with pytest.raises(ValueError, match=r"batch_tokens \(0\) must be at least 1"):
        score(model_of(model_config()), [Request([1, 2], 1)], batch_tokens=0)
