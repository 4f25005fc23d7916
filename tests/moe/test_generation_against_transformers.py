"""Greedy search and beam search give the tokens of transformers' generate on the same weights, padded batches too."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from moe.config import ModelConfig
from moe.generation import beam_search, generate
from moe.model import Transformer

transformers = pytest.importorskip("transformers", reason="the oracle of generation is transformers' generate")

VOCAB = 23
NEW = 10
PROMPTS = [[1, 2, 3], [4], [6, 7, 8, 9, 10]]
SCORE = 1e-5  # of sums of float32 log-probabilities, in nats


class Pair:
    """The same small Llama, ours and theirs."""

    def __init__(self, seed: int, sharpness: float = 1.0) -> None:
        config = ModelConfig(
            name="llama",
            d_model=16,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            max_seq_len=64,
            vocab_size=VOCAB,
            norm="rmsnorm",
            position="rope",
            bias=False,
            gated=True,
            activation="silu",
            tie_embeddings=False,
        )
        self.ours = Transformer(config, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.ours.named_parameters():
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(1 + 0.1 * drawn if "norm" in name else 0.5 * drawn)
            self.ours.head.weight.mul_(sharpness)
        self.theirs = _llama(self.ours)
        # an end that the model likes: searches meet it early and often, and the rules of stopping matter
        liked = Counter(token for row in generate(self.ours, PROMPTS, NEW) for token in row)
        self.eos = liked.most_common(2)[-1][0]
        self.several = [token for token, _ in liked.most_common(4)[1:]]
        self.many = [*range(1, VOCAB, 2)]  # nearly half of all: enough to end all of the 2 · num_beams best candidates

    def expected(self, prompts: list[list[int]], **options: Any) -> tuple[list[list[int]], list[float]]:
        """Their new tokens of each sequence, without what follows the end, and their scores."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        found = self.theirs.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=False,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        rows = [row[longest:].tolist() for row in found.sequences]
        given = options.get("eos_token_id")
        ends = given if isinstance(given, list) else [given]
        ended = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows]
        scores = getattr(found, "sequences_scores", None)
        return ended, [] if scores is None else scores.tolist()


def _llama(model: Transformer) -> Any:
    config = model.config
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_seq_len,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
    ).double()
    theirs.load_state_dict(_named(model))
    return theirs.eval()


def _named(model: Transformer) -> dict[str, Tensor]:
    named: dict[str, Any] = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, layer in enumerate(model.layers):
        prefix, attention, network = f"model.layers.{i}", layer.attention, layer.feed_forward
        query, key, value = attention.qkv.weight.split([attention.query_width, attention.kv_width, attention.kv_width])
        named |= {
            f"{prefix}.self_attn.q_proj.weight": query,
            f"{prefix}.self_attn.k_proj.weight": key,
            f"{prefix}.self_attn.v_proj.weight": value,
            f"{prefix}.self_attn.o_proj.weight": attention.out.weight,
            f"{prefix}.input_layernorm.weight": layer.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": layer.feed_forward_norm.weight,
            f"{prefix}.mlp.gate_proj.weight": network.w_gate,
            f"{prefix}.mlp.up_proj.weight": network.w_in,
            f"{prefix}.mlp.down_proj.weight": network.w_out,
        }
    return {name: tensor.detach() for name, tensor in named.items()}


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return [Pair(seed, sharpness) for seed, sharpness in ((0, 1.0), (1, 0.3), (3, 0.1))]


def test_greedy_tokens_are_theirs(pairs: list[Pair]) -> None:
    ends = 0
    for pair in pairs:
        expected, _ = pair.expected(PROMPTS, eos_token_id=pair.eos)
        assert generate(pair.ours, PROMPTS, NEW, eos_id=pair.eos) == expected
        ends += sum(len(row) < NEW for row in expected)
        assert generate(pair.ours, PROMPTS, NEW) == pair.expected(PROMPTS)[0]
    assert ends > 0  # the end was met somewhere


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_beams_are_theirs(pairs: list[Pair], length_penalty: float) -> None:
    """For each of the three rules of stopping, and some searches end otherwise by another rule."""
    found: dict[bool | str, list[Any]] = {}
    for early_stopping, pair, num_beams in itertools.product((False, True, "never"), pairs, (2, 4)):
        options: dict[str, Any] = {"num_beams": num_beams, "length_penalty": length_penalty}
        options["early_stopping"] = early_stopping
        expected, scores = pair.expected(PROMPTS, eos_token_id=pair.eos, num_return_sequences=num_beams, **options)
        rows = beam_search(pair.ours, PROMPTS, NEW, eos_id=pair.eos, **options)
        assert [len(beams) for beams in rows] == [num_beams] * len(PROMPTS)
        assert [beam.tokens for beams in rows for beam in beams] == expected
        for beam, score in zip((beam for beams in rows for beam in beams), scores, strict=True):
            assert beam.score == pytest.approx(score, rel=SCORE, abs=SCORE)
        found.setdefault(early_stopping, []).append(expected)
    lengths = {len(row) for expected in found[False] for row in expected}
    assert NEW in lengths and min(lengths) < NEW
    assert length_penalty < 0 or found[True] != found[False]
    assert length_penalty <= 0 or found["never"] != found[False]


def test_any_of_several_ends_ends(pairs: list[Pair]) -> None:
    """Greedily, in beams (which then weigh more candidates) and drawn; as a list, as in Llama 3's settings."""
    met: set[int] = set()
    for pair in pairs:
        expected, _ = pair.expected(PROMPTS, eos_token_id=pair.several)
        assert generate(pair.ours, PROMPTS, NEW, eos_id=pair.several) == expected
        whole = generate(pair.ours, PROMPTS, NEW)
        met |= {row[len(row_to_end)] for row, row_to_end in zip(whole, expected, strict=True) if len(row_to_end) < NEW}
        drawn = generate(pair.ours, PROMPTS, NEW, temperature=1.0)
        ended = [list(itertools.takewhile(lambda token, ends=pair.several: token not in ends, row)) for row in drawn]
        assert generate(pair.ours, PROMPTS, NEW, eos_id=pair.several, temperature=1.0) == ended
        for (num_beams, ends), early_stopping in itertools.product(
            ((3, pair.several), (2, pair.many[:10])), (False, True)
        ):
            options: dict[str, Any] = {"num_beams": num_beams, "early_stopping": early_stopping}
            expected, scores = pair.expected(PROMPTS, eos_token_id=ends, num_return_sequences=num_beams, **options)
            found = [b for beams in beam_search(pair.ours, PROMPTS, NEW, eos_id=ends, **options) for b in beams]
            assert [beam.tokens for beam in found] == expected
            assert [beam.score for beam in found] == pytest.approx(scores, rel=SCORE, abs=SCORE)
    assert len(met) > 1  # more than one of them was met


def test_beams_without_an_end_are_theirs(pairs: list[Pair]) -> None:
    for pair in pairs:
        expected, _ = pair.expected(PROMPTS, num_beams=3, num_return_sequences=3)
        assert [b.tokens for beams in beam_search(pair.ours, PROMPTS, NEW, num_beams=3) for b in beams] == expected


def test_beams_of_a_prompt_do_not_depend_on_the_others(pairs: list[Pair]) -> None:
    for pair in pairs:
        together = beam_search(pair.ours, PROMPTS, NEW, num_beams=3, eos_id=pair.eos)
        alone = [beam_search(pair.ours, [prompt], NEW, num_beams=3, eos_id=pair.eos)[0] for prompt in PROMPTS]
        assert [[b.tokens for b in beams] for beams in together] == [[b.tokens for b in beams] for beams in alone]


def test_a_beam_is_worth_what_the_model_says(pairs: list[Pair]) -> None:
    """The score without length penalty is the sum of log-probabilities, of the end too where it was met."""
    eos = pairs[1].eos
    found = beam_search(pairs[1].ours, PROMPTS, NEW, num_beams=3, eos_id=eos, length_penalty=0.0)
    for beams, prompt in zip(found, PROMPTS, strict=True):
        for beam in beams:
            new = beam.tokens if len(beam.tokens) == NEW else [*beam.tokens, eos]
            logits = pairs[1].ours(torch.tensor([prompt + new])).logits
            log_probs = logits[0].detach().log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(new) - 1)
            total = sum(float(log_probs[place, token]) for place, token in zip(places, new, strict=True))
            assert beam.score == pytest.approx(total, rel=SCORE)


def test_beams_end_where_they_are_told(pairs: list[Pair]) -> None:
    """`ended` finishes a continuation as the end token does."""
    ours, eos = pairs[1].ours, pairs[1].eos
    by_token = beam_search(ours, PROMPTS, NEW, num_beams=3, eos_id=eos)
    told = beam_search(ours, PROMPTS, NEW, num_beams=3, ended=lambda row, tokens: tokens[-1] == eos)
    for beams, others in zip(by_token, told, strict=True):
        assert [b.score for b in beams] == [b.score for b in others]
        assert [b.tokens for b in beams] == [b.tokens[:-1] if b.tokens[-1] == eos else b.tokens for b in others]


def test_a_search_that_everything_ends(pairs: list[Pair]) -> None:
    found = beam_search(pairs[0].ours, PROMPTS, NEW, num_beams=3, ended=lambda row, tokens: True)
    assert [[len(beam.tokens) for beam in beams] for beams in found] == [[1, 1, 1]] * len(PROMPTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 1}, r"num_beams \(1\) must be at least 2"),
        ({"num_beams": 12}, r"num_beams \(12\).*at most half the vocabulary \(23\)"),
        (
            {"num_beams": 6, "eos_id": [1, 2, 3]},
            r"num_beams \(6\).*at most 1/4 \(one part for each end token",
        ),
        ({"num_beams": 2, "early_stopping": "always"}, r"early_stopping \('always'\)"),
        ({"num_beams": 2, "length_penalty": float("nan")}, r"length_penalty \(nan\) must be from -20 to 20"),
        ({"num_beams": 2, "length_penalty": -500.0}, r"length_penalty \(-500\.0\)"),
    ],
)
def test_options_without_meaning_are_refused(pairs: list[Pair], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        beam_search(pairs[0].ours, PROMPTS, NEW, **options)
