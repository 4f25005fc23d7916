"""Reading a common beginning once changes no score, whatever the batches, the order and the ranks."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.config import ModelConfig
from moe.distributed.world import World
from moe.evaluation.scorer import Request, ScoreReport, score
from moe.evaluation.shared_prefixes import find_clusters, score_sharing_prefixes
from moe.model import Transformer
from tests.ranks import run_ranks

CLOSE = 1e-12  # relative, in float64: rounding alone


def build(config: ModelConfig) -> Transformer:
    model = Transformer(config, dtype=torch.float64)
    model.reset_parameters(seed=1)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


def some_requests(vocab_size: int = 37) -> list[Request]:
    """Questions with choices behind two sets of demonstrations, and sequences that share nothing."""
    rng = random.Random(0)

    def draw(count: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(count)]

    requests = []
    for shots in (draw(9), draw(8)):
        for _ in range(3):
            context = [*shots, *draw(3)]
            requests += [Request([*context, *draw(length)], len(context)) for length in (1, 3, 2)]
    requests += [Request(draw(length), 1) for length in (2, 12, 20)]
    requests += [Request(draw(30), 28), requests[0], Request(requests[1].tokens, requests[1].start + 1)]
    return requests


def flat(report: ScoreReport) -> list[float]:
    return [value for each in report.scores for value in each.log_probs]


@pytest.mark.parametrize("options", [{}, {"sparse": True}, {"position": "learned", "norm": "layernorm"}], ids=str)
@pytest.mark.parametrize("batch_tokens", [1, 40, 4096])
def test_the_scores_are_those_of_whole_sequences(
    model_config: Callable[..., ModelConfig], options: dict[str, Any], batch_tokens: int
) -> None:
    model, requests = build(model_config(**options)), some_requests()
    expected = score(model, requests, greedy=True)
    found = score_sharing_prefixes(model, requests, greedy=True, batch_tokens=batch_tokens, min_prefix=4)
    assert flat(found) == pytest.approx(flat(expected), rel=CLOSE)
    assert [each.greedy for each in found.scores] == [each.greedy for each in expected.scores]
    assert len({value for value in flat(found)}) > 30
    assert found.num_truncated == expected.num_truncated == 1
    assert found.num_forward_tokens < 0.6 * expected.num_forward_tokens


def test_the_order_of_the_requests_changes_no_bit(model_config: Callable[..., ModelConfig]) -> None:
    model, requests = build(model_config(sparse=True)), some_requests()
    order = list(range(len(requests)))
    random.Random(1).shuffle(order)
    found = score_sharing_prefixes(model, requests, min_prefix=4)
    shuffled = score_sharing_prefixes(model, [requests[i] for i in order], min_prefix=4)
    assert [found.scores[i] for i in order] == shuffled.scores


def test_clusters_share_their_beginning_and_none_of_it_is_scored() -> None:
    requests = some_requests()
    clusters = find_clusters(requests, 24, min_prefix=4)
    assert len(clusters) == 2  # one for each set of demonstrations
    members = [index for cluster in clusters for index in cluster.members]
    assert len(members) == len(set(members)) == 20
    for cluster in clusters:
        assert len({tuple(requests[i].tokens[: cluster.prefix_length]) for i in cluster.members}) == 1
        assert all(requests[i].start > cluster.prefix_length for i in cluster.members)
        assert cluster.prefix_length >= 8
    assert find_clusters(requests, 24, min_prefix=12) == []
    assert find_clusters([requests[0], requests[0]], 24, min_prefix=4) == []  # the same sequence saves nothing
    assert find_clusters([], 24) == []


def test_a_question_with_its_choices_is_a_cluster_where_questions_share_little() -> None:
    contexts = [[1, 2, *range(10 * i, 10 * i + 8)] for i in (3, 4, 5)]
    requests = [Request([*context, choice], 10) for context in contexts for choice in (7, 8)]
    clusters = find_clusters(requests, 64, min_prefix=4)
    assert [(cluster.prefix_length, cluster.members) for cluster in clusters] == [(9, [0, 1]), (9, [2, 3]), (9, [4, 5])]


def test_a_model_that_drops_tokens_shares_nothing(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True)
    assert config.moe is not None
    model = build(replace(config, moe=replace(config.moe, eval_capacity_factor=1.0)))
    requests = some_requests()
    found, expected = score_sharing_prefixes(model, requests, min_prefix=4), score(model, requests)
    assert found == expected
    assert found.dropped_fraction > 0


def _score_on_ranks(world: World | None, state: dict[str, Any], config: ModelConfig) -> list[float]:
    model = Transformer(config, dtype=torch.float64)
    model.load_state_dict(state)
    return flat(score_sharing_prefixes(model, some_requests(), batch_tokens=60, min_prefix=4, world=world))


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_any_number_of_ranks_gives_the_same_bits(model_config: Callable[..., ModelConfig], num_ranks: int) -> None:
    model = build(model_config(sparse=True))
    alone = _score_on_ranks(None, model.state_dict(), model.config)
    for found in run_ranks(_score_on_ranks, num_ranks, model.state_dict(), model.config):
        assert found == alone


def test_a_token_outside_the_vocabulary_is_refused_in_a_cluster_too(model_config: Callable[..., ModelConfig]) -> None:
    requests = some_requests()
    requests[3] = requests[3]._replace(tokens=[*requests[3].tokens[:-1], 37])
    assert any(3 in cluster.members for cluster in find_clusters(requests, 64, 4))
    with pytest.raises(ValueError, match="request 3 holds the token 37, which is outside"):
        score_sharing_prefixes(build(model_config()), requests, min_prefix=4)
