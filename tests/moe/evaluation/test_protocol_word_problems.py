from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe.config import ModelConfig
from moe.evaluation.datasets import read
from moe.evaluation.protocols import Setting, mgsm, prepare_task, run_task, word_problems
from moe.evaluation.protocols.word_problems import last_number
from moe.model import Transformer
from tests.shared_data import shared_data


class Bytes:
    """A token for each byte; 0 separates."""

    eos_id = begin_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def decode(self, tokens: list[int]) -> str:
        return bytes(max(token - 1, 0) for token in tokens).decode(errors="replace")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 + 6 = 11. The answer is 11.", 11.0),
        ("Die Antwort ist 1.250 Euro", 1250.0),
        ("1,250,000", 1250000.0),
        ("it is 2.5", 2.5),
        ("es 2,5.", 2.5),
        ("1234,5", 1234.5),
        ("it costs $1,234.50", 1234.5),
        ("es kostet 1.234,50 Euro", 1234.5),
        ("1,234.00 in all", 1234.0),
        ("1.234.567,5", 1234567.5),
        ("a share of 0.125", 0.125),
        ("0,500", 0.5),
        ("उत्तर ১১।", 11.0),
        ("minus -7!", -7.0),
        ("18$ 20%", 20.0),
        ("none", None),
    ],
)
def test_the_last_number(text: str, expected: float | None) -> None:
    assert last_number(text) == expected


def test_prompts_have_the_words_of_the_exemplars() -> None:
    problem = {"question": "Wie viele?", "answer": None, "answer_number": 18}
    item = mgsm.template("de")(problem)
    assert item.template == "Frage: Wie viele? Schritt-für-Schritt-Antwort: <mask>"
    assert item.candidates == ("18",)
    exemplar = {"question": "問題：何\n個？", "answer": "ステップごとの答え：\n答えは11です。", "answer_number": 11}
    assert mgsm.template("ja")(exemplar).demonstration == "問題： 何 個？ ステップごとの答え： 答えは11です。"
    assert mgsm.template("en")(exemplar).demonstration == "Question: 何 個？ Step-by-Step Answer: 答えは11です。"
    with pytest.raises(ValueError, match="mgsm has no template in the language 'xx'; it has: bn, de"):
        mgsm.template("xx")


Make = Callable[..., ModelConfig]


def model_of(make: Make, max_seq_len: int = 200) -> Transformer:
    model = Transformer(make(vocab_size=257, num_layers=1, max_seq_len=max_seq_len))
    model.reset_parameters(seed=0)
    return model


def test_answers_are_matched_with_their_problems(model_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands in for the model: it answers a problem's own number, but for the third."""
    prompts: list[str] = []
    ends: object = {0}

    def answer(model: Transformer, asked: list[list[int]], room: int, **options: Any) -> list[list[int]]:
        assert options["eos_id"] == ends
        assert all(len(tokens) + room <= 200 for tokens in asked)
        texts = [Bytes().decode(tokens[1:]) for tokens in asked]
        prompts.extend(texts)
        numbers = [int(text.split("n=")[1].split()[0]) for text in texts]
        return [Bytes().encode(f"first 3, then {n + (n == 12)}.") for n in numbers]

    monkeypatch.setattr(word_problems, "generate", answer)
    rows = [{"question": "x" * 20 * i + f" n={10 + i}", "answer": None, "answer_number": 10 + i} for i in range(7)]
    setting = Setting("xglm", "mgsm", language="en")
    for batch_tokens in (1, 500, 10**6):
        result = run_task(
            model_of(model_config), Bytes(), prepare_task(setting, lambda *_: rows), batch_tokens=batch_tokens
        )
        assert result.runs[0].credits == (1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0)
    ends = (0, 7)
    prepared = prepare_task(setting, lambda *_: rows)
    assert run_task(model_of(model_config), Bytes(), prepared, end_ids=ends).runs == result.runs
    whole = [f"Question: {row['question'].strip()} Step-by-Step Answer:" for row in rows]
    room = 200 - 100 - 2  # half is for the answer, two are reserved
    assert set(prompts) == {text[-room:] for text in whole}
    assert result.runs[0].num_cut == sum(len(text) > room for text in whole) > 0
    with pytest.raises(ValueError, match=r"precision \(bf16\) must be fp32"):
        run_task(model_of(model_config), Bytes(), prepare_task(setting, lambda *_: rows), precision="bf16")


def test_answers_do_not_compete_for_experts(
    tight_model: Callable[..., Transformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an evaluation capacity each is written alone."""
    sizes = []

    def answer(model: Transformer, asked: list[list[int]], room: int, **options: Any) -> list[list[int]]:
        sizes.append(len(asked))
        return [[1] for _ in asked]

    monkeypatch.setattr(word_problems, "generate", answer)
    tight = tight_model(257, max_seq_len=200)
    rows = [{"question": f"n={i}", "answer": None, "answer_number": i} for i in range(3)]
    run_task(tight, Bytes(), prepare_task(Setting("xglm", "mgsm", language="en"), lambda *_: rows))
    assert sizes == [1, 1, 1]


def test_mgsm_runs_on_files(model_config: Make) -> None:
    data = shared_data(".")
    for language, template_language in (("de", "same"), ("th", "en")):
        options = {"language": language, "template_language": template_language, "num_shots": 2, "num_runs": 1}
        setting = Setting("xglm", "mgsm", limit=2, **options)
        result = run_task(
            model_of(model_config, 4096), Bytes(), prepare_task(setting, lambda *where: read(*where, data))
        )
        assert result.runs[0].mean_shots == 2.0
        assert result.chance == 0.0
