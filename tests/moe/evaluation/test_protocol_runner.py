from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from moe.config import ModelConfig
from moe.evaluation.protocols import Setting, TaskResult, prepare_task, run_task, runner, runs
from moe.evaluation.protocols.english import copa
from moe.evaluation.scorer import Request, ScoreReport, score
from moe.model import Transformer
from tests.moe.evaluation.test_protocol_templates import CASES

Rows = list[dict[str, Any]]
NOUNS = ("cat", "dog", "cow", "hen", "pig", "ram", "bee", "owl")


class Bytes:
    """A token for each byte; 0 separates."""

    eos_id = begin_id = 0

    def encode(self, text: str) -> list[int]:
        return [1 + byte for byte in text.encode()]

    def decode(self, tokens: Sequence[int]) -> str:
        return "|".join(bytes(part).decode() for part in self._parts(tokens))

    def _parts(self, tokens: Sequence[int]) -> list[list[int]]:
        parts: list[list[int]] = [[]]
        for token in tokens:
            if token == 0:
                parts.append([])
            else:
                parts[-1].append(token - 1)
        return parts


TOKENIZER = Bytes()
Make = Callable[..., ModelConfig]


def model_of(make: Make, dtype: torch.dtype = torch.float64, **changes: Any) -> Transformer:
    model = Transformer(make(vocab_size=257, **({"max_seq_len": 96} | changes)), dtype=dtype)
    model.reset_parameters(seed=1)
    return model.eval()


def copa_rows(num: int, seed: int = 0) -> Rows:
    """Made-up rows in which nothing tells which of two different nouns is right."""
    rng = random.Random(seed)
    rows = []
    for i in range(num):
        first, second = rng.sample(NOUNS, 2)
        premise = f"{rng.choice(NOUNS)} {i:02d} {rng.choice(NOUNS)}."
        labels = {"question": rng.choice(["cause", "effect"]), "label": rng.randrange(2)}
        rows.append({"premise": premise, "choice1": f"{first}s ate.", "choice2": f"a {second} ran.", **labels})
    return rows


def read_of(rows: Rows, shown: Rows | None = None) -> runner.Reader:
    """Gives `shown` for the splits that demonstrations come from, `rows` for all others."""
    return lambda hub_id, subset, split: rows if shown is None or split != "train" else shown


def swapped(rows: Rows) -> Rows:
    return [row | {"choice1": row["choice2"], "choice2": row["choice1"]} for row in rows]


def run(
    model: Transformer, task: str, read: runner.Reader, protocol: str = "artetxe2021", **options: Any
) -> TaskResult:
    batch_tokens = options.pop("batch_tokens", 2000)
    return run_task(model, TOKENIZER, prepare_task(Setting(protocol, task, **options), read), batch_tokens=batch_tokens)


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """The requests of all calls of the scorer, which goes on as ever."""
    seen: list[Request] = []

    def watch(model: Transformer, asked: Sequence[Request], **options: Any) -> ScoreReport:
        seen.extend(asked)
        return score(model, asked, **options)

    monkeypatch.setattr(runs, "score_sharing_prefixes", watch)
    return seen


def log_probs(model: Transformer, text: str) -> list[float]:
    """Of each byte of a text that the separator precedes, in a pass of its own."""
    tokens = torch.tensor([0, *TOKENIZER.encode(text)])
    rows = model(tokens[None, :-1]).logits[0].detach().log_softmax(-1)
    return rows[torch.arange(len(tokens) - 1), tokens[1:]].tolist()


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def test_mean_after_the_common_prefix(model_config: Make) -> None:
    model, rows = model_of(model_config), copa_rows(30)
    expected = []
    for row in rows:
        item = copa(row)
        one, other = item.texts
        k = next(i for i in range(len(one)) if one[i] != other[i])  # letters are bytes here
        means = [mean(log_probs(model, text)[k:]) for text in (one, other)]
        expected.append(int(means[1] > means[0]))
    result = run(model, "copa", read_of(rows))
    assert list(result.runs[0].chosen) == expected
    assert list(result.runs[0].credits) == [float(row["label"] == c) for row, c in zip(rows, expected, strict=True)]
    assert 0 < sum(expected) < 30
    assert result.chance == 0.5


def winograd_rows(num: int) -> Rows:
    rng = random.Random(3)
    rows = []
    for i in range(num):
        first, second = rng.sample(NOUNS, 2)
        rows.append({"sentence": f"{i} so the _ {rng.choice(NOUNS)} it.", "option1": first, "option2": f"old {second}"})
        rows[-1]["answer"] = str(1 + i % 2)
    return rows


def test_winogrande_scores_what_follows(model_config: Make) -> None:
    model, rows = model_of(model_config), winograd_rows(30)
    expected = []
    for row in rows:
        end = len(row["sentence"].split("_")[1])
        sums = [
            sum(log_probs(model, row["sentence"].replace("_", row[name]))[-end:]) for name in ("option1", "option2")
        ]
        expected.append(int(sums[1] > sums[0]))
    assert list(run(model, "winogrande", read_of(rows)).runs[0].chosen) == expected
    assert 0 < sum(expected) < 30


def letters_rows(num: int) -> Rows:
    rng = random.Random(5)
    rows = []
    for i in range(num):
        texts = rng.sample([*NOUNS, "zebra", "antelope"], 3)
        choices = {"text": texts, "label": ["A", "B", "C"]}
        row = {"choices": choices, "answerKey": "ABC"[i % 3]}
        rows.append(row | {"question_stem": f"{i} a {rng.choice(NOUNS)} is", "question": f"{i} {rng.choice(NOUNS)}?"})
    return rows


def test_openbookqa_takes_off_what_an_answer_gets_without_the_question(model_config: Make) -> None:
    model, rows = model_of(model_config), letters_rows(30)
    expected = []
    for row in rows:
        scores = []
        for choice in row["choices"]["text"]:
            end = len(choice) + 1  # with its full stop; no three of the words begin alike
            with_stem = log_probs(model, f"{row['question_stem']} {choice}.")[-end:]
            without = log_probs(model, f"Answer: {choice}.")[-end:]
            scores.append(sum(with_stem) - sum(without))
        expected.append(max(range(3), key=scores.__getitem__))
    result = run(model, "openbookqa", read_of(rows))
    assert list(result.runs[0].chosen) == expected
    assert len(set(expected)) == 3
    assert result.chance == pytest.approx(1 / 3)


@pytest.mark.parametrize(("task", "blank", "shown"), [("openbookqa", "|Answer: ", 0), ("arc_challenge", "|It is ", 2)])
def test_demonstrations_before_a_blank(
    model_config: Make, requests: list[Request], task: str, blank: str, shown: int
) -> None:
    rows = letters_rows(4)
    run(model_of(model_config, max_seq_len=400), task, read_of(rows), num_shots=2, num_runs=1)
    texts = [TOKENIZER.decode(request.tokens) for request in requests]
    blanks = [text for text in texts if blank in text]
    assert len(blanks) == 4 * 3
    assert {text.count("|") for text in blanks} == {1 + shown}
    assert {text.count("|") for text in texts if blank not in text} == {3}


def test_arc_challenge_is_calibrated_without_the_question(model_config: Make) -> None:
    model, rows = model_of(model_config), letters_rows(40)
    chosen = {}
    for calibrated in (True, False):
        chosen[calibrated] = []
        for row in rows:
            scores = []
            for choice in row["choices"]["text"]:
                end = len(choice) + 1
                score_of = [
                    mean(log_probs(model, f"{front}It is {choice}.")[-end:]) for front in (f"{row['question']} ", "")
                ]
                scores.append(score_of[0] - score_of[1] * calibrated)
            chosen[calibrated].append(max(range(3), key=scores.__getitem__))
    assert list(run(model, "arc_challenge", read_of(rows)).runs[0].chosen) == chosen[True]
    assert list(run(model, "arc_challenge", read_of(rows), "xglm").runs[0].chosen) == chosen[False]
    assert chosen[True] != chosen[False]


def test_swapping_the_choices_flips_every_choice(model_config: Make) -> None:
    model, rows = model_of(model_config, torch.float32), copa_rows(40)
    there, back = (run(model, "copa", read_of(each)).runs[0] for each in (rows, swapped(rows)))
    assert [1 - choice for choice in there.chosen] == list(back.chosen)
    assert there.num_ties == 0


def test_order_and_batches_change_no_choice(model_config: Make) -> None:
    model, rows = model_of(model_config, torch.float32, sparse=True), copa_rows(40)
    chosen = run(model, "copa", read_of(rows)).runs[0].chosen
    assert run(model, "copa", read_of(rows[::-1])).runs[0].chosen == chosen[::-1]
    for batch_tokens in (1, 300, 10**6):
        assert run(model, "copa", read_of(rows), batch_tokens=batch_tokens).runs[0].chosen == chosen


@pytest.fixture(scope="module")
def knowing() -> Callable[[Make], tuple[Transformer, Rows]]:
    """A model that has learnt the right text of each row by heart."""
    made: list[tuple[Transformer, Rows]] = []

    def get(make: Make) -> tuple[Transformer, Rows]:
        if made:
            return made[0]
        torch.manual_seed(0)
        rows = copa_rows(24)
        model = model_of(make, torch.float32, d_model=48, d_ff=96, num_layers=2, max_seq_len=64, init_std=0.1)
        texts = [[0, *TOKENIZER.encode(copa(row).demonstration)] for row in rows]
        width = max(map(len, texts))
        tokens = torch.tensor([text + [0] * (width - len(text)) for text in texts])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
        for _ in range(150):
            losses = model.train()(tokens[:, :-1], tokens[:, 1:].contiguous()).token_losses
            optimizer.zero_grad()
            losses[tokens[:, 1:] != 0].mean().backward()
            optimizer.step()
        made.append((model.eval(), rows))
        return made[0]

    return get


def test_a_model_that_knows_is_right_and_shuffled_labels_are_chance(
    model_config: Make, knowing: Callable[[Make], tuple[Transformer, Rows]]
) -> None:
    model, rows = knowing(model_config)
    assert run(model, "copa", read_of(rows)).accuracy == 1.0
    assert run(model, "copa", read_of([row | {"label": 1 - row["label"]} for row in rows])).accuracy == 0.0
    rng = random.Random(1)
    accuracies = []
    for _ in range(8):
        labels = [row["label"] for row in rows]
        rng.shuffle(labels)
        shuffled_rows = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
        accuracies.append(run(model, "copa", read_of(shuffled_rows)).accuracy)
    assert abs(mean(accuracies) - 0.5) < 4 * 0.5 / math.sqrt(8 * len(rows))


def test_equal_candidates_share_the_credit(model_config: Make) -> None:
    rows = [row | {"choice2": row["choice1"], "label": i % 2} for i, row in enumerate(copa_rows(6))]
    result = run(model_of(model_config), "copa", read_of(rows))
    assert result.runs[0].credits == (0.5,) * 6
    assert result.runs[0].num_ties == 6


def test_shots_stand_before_the_question(model_config: Make, requests: list[Request]) -> None:
    model, rows, shown = model_of(model_config, max_seq_len=400), copa_rows(5), copa_rows(9, seed=7)
    result = run(model, "copa", read_of(rows, shown), num_shots=3, num_runs=2)
    known = {copa(row).demonstration for row in shown}
    assert len(requests) == 2 * 5 * 2
    drawn = []
    for i, request in enumerate(requests):
        empty, *demonstrations, question = TOKENIZER.decode(request.tokens).split("|")
        assert empty == ""
        assert question == copa(rows[i // 2 % 5]).texts[i % 2]
        assert len(set(demonstrations)) == 3
        assert set(demonstrations) <= known
        drawn.append(set(demonstrations))
    assert all(each == drawn[0] for each in drawn[:10])  # a run draws once,
    assert drawn[10] != drawn[0]  # the next one others
    assert len({tuple(TOKENIZER.decode(r.tokens).split("|")[1:4]) for r in requests[:10]}) > 1  # and shuffles them
    assert len(result.runs) == 2
    assert result.runs[0].mean_shots == 3.0
    assert result.settings["demo_split"] == "train"
    assert run(model, "copa", read_of(rows, shown), num_shots=3, num_runs=2) == result


def test_runs_are_the_protocols(model_config: Make) -> None:
    model, rows = model_of(model_config), copa_rows(3)
    assert len(run(model, "copa", read_of(rows), num_shots=1).runs) == 25
    result = run(model, "copa", read_of(rows), "xglm", num_shots=1)
    assert len(result.runs) == 5
    assert result.interval_over_demonstrations is not None
    assert result.settings["rule"] == "mean"


def test_a_split_that_shows_itself_leaves_the_question_out(model_config: Make, requests: list[Request]) -> None:
    rows = winograd_rows(6)
    run(model_of(model_config, max_seq_len=400), "xwinograd", read_of(rows), "xglm", language="ru", num_shots=5)
    for request in requests:
        _, *demonstrations, question = TOKENIZER.decode(request.tokens).split("|")
        number = question.split()[0]
        assert sorted(each.split()[0] for each in demonstrations) == sorted(set("012345") - {number})


@pytest.mark.parametrize(
    ("template_language", "demo_language", "demo_word", "question_word"),
    [
        ("en", None, "because", "because"),
        ("same", None, "kwa sababu", "kwa sababu"),
        ("vi", None, "bởi vì", "bởi vì"),
        ("same", "it", "perché", "kwa sababu"),
        ("en", "it", "because", "because"),
        ("same", "en", "because", "kwa sababu"),
    ],
)
def test_languages_of_template_demonstrations_and_question(
    model_config: Make,
    requests: list[Request],
    template_language: str,
    demo_language: str | None,
    demo_word: str,
    question_word: str,
) -> None:
    read_from = []

    def read(hub_id: str, subset: str | None, split: str) -> Rows:
        read_from.append((hub_id, subset, split))
        row = {"choice1": "c", "choice2": "d", "question": "cause", "label": 1}
        return [row | {"premise": f"{subset} {split} {i}"} for i in range(4)]

    languages = {"language": "sw", "template_language": template_language, "demo_language": demo_language}
    run(model_of(model_config, max_seq_len=400), "xcopa", read, "xglm", num_shots=2, num_runs=1, **languages)
    subset = {None: "sw", "en": "copa"}.get(demo_language, demo_language)
    hub_id = "aps/super_glue" if demo_language == "en" else "cambridgeltl/xcopa"
    assert read_from == [("cambridgeltl/xcopa", "sw", "test"), (hub_id, subset, "validation")]
    for request in requests:
        _, *demonstrations, question = TOKENIZER.decode(request.tokens).split("|")
        assert len(demonstrations) == 2
        assert all(f"{subset} validation" in each and f" {demo_word} d" in each for each in demonstrations)
        assert question.startswith("sw test")
        assert f" {question_word} " in question


def test_lambada_asks_for_the_whole_word(
    model_config: Make, knowing: Callable[[Make], tuple[Transformer, Rows]]
) -> None:
    model, rows = knowing(model_config)
    texts = [copa(row).demonstration for row in rows]
    right = run(model, "lambada", read_of([{"text": text} for text in texts]))
    assert right.accuracy == 1.0
    assert right.chance == 0.0
    nats = [-sum(log_probs(model, text)[-len(" ran.") :]) for text in texts]  # with its space, for letters are tokens
    assert right.runs[0].nats == pytest.approx(nats, rel=1e-3, abs=1e-4)
    assert right.perplexity == pytest.approx(math.exp(mean(nats)), rel=1e-3)
    wrong = run(model, "lambada", read_of([{"text": text[:-1] + "!"} for text in texts]))  # of four letters three right
    assert wrong.accuracy == 0.0
    assert wrong.perplexity is not None
    assert wrong.perplexity > 10.0


@pytest.mark.parametrize(
    ("task", "case", "language", "sources"),
    [
        ("hellaswag", "hellaswag", None, ["Rowan/hellaswag None validation", "Rowan/hellaswag None train"]),
        ("record", "record", None, ["aps/super_glue record validation", "aps/super_glue record train"]),
        ("storycloze", "story_cloze", None, ["LSDSem/story_cloze 2016 test", "LSDSem/story_cloze 2016 validation"]),
        ("xstorycloze", "story_cloze", "eu", ["juletxara/xstory_cloze eu eval", "juletxara/xstory_cloze eu train"]),
        ("xnli", "xnli en", "sw", ["facebook/xnli sw test", "facebook/xnli sw validation"]),
        (
            "pawsx",
            "pawsx",
            "ko",
            ["google-research-datasets/paws-x ko test", "google-research-datasets/paws-x ko validation"],
        ),
    ],
)
def test_tasks_read_the_authors_splits(
    model_config: Make, requests: list[Request], task: str, case: str, language: str | None, sources: list[str]
) -> None:
    _, row, expected, _ = CASES[case]
    read_from = []

    def read(*where: str | None) -> Rows:
        read_from.append(" ".join(map(str, where)))
        return [row] * 3

    model = model_of(model_config, max_seq_len=400)
    result = run(model, task, read, "xglm", language=language, num_shots=2, num_runs=1)
    assert read_from == sources
    shown = [" ".join(expected.split("\n\n"))] * 2
    texts = [TOKENIZER.decode(request.tokens).split("|", 1)[1].replace("|", " ") for request in requests]
    assert any(text == " ".join([*shown, shown[0]]) for text in texts)
    assert result.settings["prompt_on_record"]


def test_what_does_not_fit_is_counted(model_config: Make) -> None:
    rows = copa_rows(4)
    rows[1]["premise"] = "long " * 20 + "."
    result = run(model_of(model_config, max_seq_len=48), "copa", read_of(rows, copa_rows(8)), num_shots=2, num_runs=1)
    assert result.runs[0].num_cut == 1
    assert result.runs[0].mean_shots < 2


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("copa", {"protocol": "gpt3"}, r"protocol \('gpt3'\) must be one of: artetxe2021, xglm"),
        ("coqa", {}, "the protocol artetxe2021 has no task 'coqa'; it has: arc_challenge"),
        ("copa", {"language": "de"}, "copa has no language 'de'; it has: en"),
        ("xcopa", {"protocol": "xglm"}, "xcopa has several languages; choose with --languages from: et, ht"),
        ("xcopa", {"protocol": "xglm", "language": "de"}, "xcopa has no language 'de'; it has: et"),
        (
            "xcopa",
            {"protocol": "xglm", "language": "et", "demo_language": "de", "num_shots": 1},
            "no demonstrations in 'de'.*zh, en",
        ),
        ("xcopa", {"protocol": "xglm", "language": "et", "template_language": "de"}, "no corrected template .*'de'"),
        ("blimp", {"num_shots": 1}, "blimp has no examples to show; set num_shots to 0"),
        ("blimp", {"subsets": ("nonsense",)}, "blimp has no subset 'nonsense'; it has: adjunct_island"),
        ("copa", {"num_shots": 9}, r"num_shots \(9\) needs 9 examples to show, .* has 4"),
        ("copa", {"num_shots": -1}, r"num_shots \(-1\) must not be negative"),
        ("copa", {"num_runs": 3}, r"num_runs \(3\) must be 1 or null without demonstrations"),
        ("copa", {"limit": 0}, r"limit \(0\) must be at least 1"),
    ],
)
def test_settings_that_cannot_be(model_config: Make, task: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(model_of(model_config), task, read_of(copa_rows(5), copa_rows(4)), **options)


def test_empty_files_and_wrong_rows_are_named(model_config: Make) -> None:
    with pytest.raises(ValueError, match="aps/super_glue, split validation, has no rows"):
        run(model_of(model_config), "copa", read_of([]))
    rows = copa_rows(3)
    del rows[2]["label"]
    with pytest.raises(ValueError, match=r"aps/super_glue \(copa\), split validation, row 2: lacks label"):
        run(model_of(model_config), "copa", read_of(rows))
