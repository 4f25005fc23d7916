from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F

from moe.config import ModelConfig
from moe.data.loader import TokenBatch
from moe.evaluation.perplexity import SplitScore, evaluate
from moe.model import Transformer


class Windows:
    """One domain of 13 tokens in windows of 5, two to a batch, the last one padded."""

    domain = "docs"
    num_bytes = 40
    document_lengths = (4, 9)

    def __init__(self, domain: str = "docs") -> None:
        self.domain = domain
        self.stream = torch.randint(37, (14,), generator=torch.Generator().manual_seed(len(domain)))

    def __iter__(self) -> Iterator[TokenBatch]:
        inputs, targets = F.pad(self.stream[:-1], (0, 2)), F.pad(self.stream[1:], (0, 2))
        mask = torch.arange(15) < 13
        yield TokenBatch(inputs[:10].view(2, 5), targets[:10].view(2, 5), None, None)
        yield TokenBatch(inputs[10:].view(1, 5), targets[10:].view(1, 5), mask[10:].view(1, 5), None)


def total_nats(model: Transformer, windows: Windows) -> float:
    """Window by window, without padding."""
    total = 0.0
    for start in range(0, 13, 5):
        end = min(start + 5, 13)
        logits = model.eval()(windows.stream[None, start:end]).logits[0].detach()
        total += float(F.cross_entropy(logits.double(), windows.stream[start + 1 : end + 1], reduction="sum"))
    return total


@pytest.mark.parametrize("sparse", [False, True])
def test_figures_follow_from_the_sum_of_nats(model_config: Callable[..., ModelConfig], sparse: bool) -> None:
    model = Transformer(model_config(sparse=sparse))
    model.reset_parameters(seed=0)
    windows = [Windows("docs"), Windows("code!")]
    score = evaluate(model.train(), windows)
    assert model.training
    assert list(score.domains) == ["docs", "code!"]
    for domain in windows:
        nats, figures = total_nats(model, domain), score.domains[domain.domain]
        assert figures.num_tokens == 13
        documents = score.documents[domain.domain]
        assert documents.num_tokens == (4, 9)
        assert sum(documents.nats) == pytest.approx(nats, rel=1e-5)
        logits = model.eval()(domain.stream[None, :4]).logits[0].detach()
        first = float(F.cross_entropy(logits.double(), domain.stream[1:5], reduction="sum"))
        model.train()
        assert documents.nats[0] == pytest.approx(first, rel=1e-5)
        assert figures.cross_entropy == pytest.approx(nats / 13, rel=1e-5)
        assert figures.perplexity == pytest.approx(math.exp(nats / 13), rel=1e-5)
        assert figures.bits_per_byte == pytest.approx(nats / math.log(2) / 40, rel=1e-5)
    if sparse:
        assert [sum(layer) for layer in score.tokens_per_expert] == [2 * 13 * 2]
    else:
        assert score.tokens_per_expert == []


def test_a_model_that_diverged_is_scored(model_config: Callable[..., ModelConfig]) -> None:
    model = Transformer(model_config())
    model.reset_parameters(seed=0)
    with torch.no_grad():
        model.embedding.weight *= 1e6
    figures = evaluate(model, [Windows()]).domains["docs"]
    assert 709 < figures.cross_entropy < math.inf
    assert figures.perplexity == math.inf
    assert figures.figures() == {**figures._asdict(), "perplexity": None}
    json.dumps(figures.figures(), allow_nan=False)


def test_dead_experts_are_counted_over_layers() -> None:
    assert SplitScore({}, {"a": [[0, 1, 0], [0, 1, 0]], "b": [[0, 2, 0], [1, 0, 0]]}, {}).dead_experts == 3
