"""The samples of a finished run: they never cost it its figures."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe.compose import compose
from moe.config import EvalConfig, ModelConfig
from moe.data.tokenizer import Tokenizer
from moe.generation import continue_texts
from moe.model import Transformer
from moe.run import train
from moe.samples import sample_texts


def model_of(tokenizer: Tokenizer, position: str) -> Transformer:
    model = Transformer(ModelConfig("test", 16, 24, 1, 2, 16, vocab_size=tokenizer.vocab_size, position=position))
    model.reset_parameters(seed=0)
    return model


@pytest.mark.parametrize("position", ["sinusoidal", "learned", "rope"])
def test_samples_end_where_the_positions_do(tokenizer: Tokenizer, position: str) -> None:
    model = model_of(tokenizer, position)
    short, long = "the cat", "the cat sat on a dog. " * 4
    room = 16 - 1 - len(tokenizer.encode(short))  # one position is the separator's
    assert 0 < room < 16 < len(tokenizer.encode(long))
    config = EvalConfig(prompts=[short, long, short], sample_tokens=40, temperature=1.0, top_p=1.0)
    samples = sample_texts(model, tokenizer, config, seed=3)
    prompts, tokens = ([short, short], room) if position != "rope" else ([short, long, short], 40)
    expected = continue_texts(model, tokenizer, prompts, tokens, temperature=1.0, seed=3)
    if position != "rope":
        expected.insert(1, " [no text: the prompt takes all 16 positions of the model]")
    assert samples == [f"=== {p!r}\n{p}{text}" for p, text in zip(config.prompts, expected, strict=True)]


def test_a_model_of_nans_has_samples_that_say_so(tokenizer: Tokenizer) -> None:
    model = model_of(tokenizer, "rope")
    with torch.no_grad():
        model.embedding.weight.fill_(float("nan"))
    (sample,) = sample_texts(model, tokenizer, EvalConfig(sample_tokens=3), seed=0)
    assert sample.startswith("=== ''\n [no text: ")


def test_a_run_shorter_than_its_samples_completes(overrides: list[str], tmp_path: Path) -> None:
    """Default samples are longer than this model's 32 positions, and it cannot go beyond them."""
    run_dir = tmp_path / "run"
    train(compose([*overrides, "model.position=learned", "eval.sample_tokens=96", f"run_dir={run_dir}"]))
    assert (run_dir / "results.json").exists()
