"""A whole evaluation of a small model against the same figures computed position by position."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

pytest.importorskip("rouge_score", reason="ROUGE-L is rouge-score's (extra `eval`)")

from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer
from moe.generation import generate
from moe.instruct.evaluation import EvaluationSettings, EvaluationTask, Protocol, evaluate_tasks, find_protocol
from moe.instruct.evaluation.metrics import rouge_l
from moe.instruct.evaluation.writing import write_answers
from moe.instruct.formatting import Layout
from moe.model import Transformer
from tests.moe.instruct.conftest import record

RELATIVE = 1e-5  # float32 of one pass against float32 of another
CHOICES = ("dog", "the red log", "cat")
PROTOCOL = Protocol("test", num_shots=(0,), layout=Layout(), max_new_tokens=6)


@pytest.fixture
def model(tokenizer: Tokenizer, model_config: Callable[..., ModelConfig]) -> Transformer:
    model = Transformer(model_config(sparse=True, vocab_size=tokenizer.vocab_size, max_seq_len=160))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def tasks() -> list[EvaluationTask]:
    ranked = [
        record(f"the {word} sat", CHOICES[i % 2], candidates=CHOICES, example=f"r{i}")
        for i, word in enumerate(("cat", "dog", "log", "mat", "red", "ran"))
    ]
    written = [record(f"a {word}", "ran to the log", example=f"w{i}") for i, word in enumerate(("cat", "dog", "mat"))]
    return [
        EvaluationTask("b/ranked", "b", "QA", 1, ranked, ranked),
        EvaluationTask("b/written", "b", "Data to Text", 2, written, written),
    ]


def log_prob(model: Transformer, tokenizer: Tokenizer, source: str, answer: str) -> tuple[float, int]:
    """Of the answer's tokens and the end's behind the source, and their number, from the logits."""
    before = [tokenizer.eos_id, *tokenizer.encode(source)]
    tokens = [tokenizer.eos_id, *tokenizer.encode(f"{source} {answer}"), tokenizer.eos_id]
    assert tokens[: len(before)] == before
    with torch.no_grad():
        logits = model(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    values = [logits[i - 1, tokens[i]].item() for i in range(len(before), len(tokens))]
    return math.fsum(values), len(values)


def test_against_logits(model: Transformer, tokenizer: Tokenizer) -> None:
    found = evaluate_tasks(model, tokenizer, tasks(), EvaluationSettings(PROTOCOL, batch_tokens=64))
    first, second = found.results["tasks"].values()
    by_hand = []
    credits = []
    for row in tasks()[0].records:
        source = f"Do it.\n\n{row.input}\nAnswer:"
        values = [log_prob(model, tokenizer, source, choice) for choice in CHOICES]
        best = max(range(3), key=lambda i: values[i][0])
        credits.append(float(CHOICES[best] == row.targets[0]))
        by_hand.append(values[CHOICES.index(row.targets[0])])
    assert first["metrics"]["accuracy"]["value"] == pytest.approx(sum(credits) / 6)
    loss = -sum(value for value, _ in by_hand) / sum(count for _, count in by_hand)
    assert first["metrics"]["loss"]["value"] == pytest.approx(loss, rel=RELATIVE)
    assert first["series"]["loss"]["counts"] == [count for _, count in by_hand]
    assert first["chance"] == {"accuracy": pytest.approx(1 / 3)}
    assert first["constant"] == {"accuracy": 0.5}
    assert (first["primary"], second["primary"]) == ("accuracy", "rouge_l")
    assert second["metrics"].keys() == {"loss", "rouge_l", "exact_match"}
    scores = {row["example"]: row["candidates"] for row in found.samples if row["task"] == "b/ranked"}
    source = "Do it.\n\nthe cat sat\nAnswer:"
    assert scores["r0"]["cat"] == pytest.approx(log_prob(model, tokenizer, source, "cat")[0], rel=RELATIVE)
    json.dumps(found.results, allow_nan=False)
    against = Protocol("test", num_shots=(0,), layout=Layout(), normalisation="unconditional", score_end=True)
    samples = evaluate_tasks(model, tokenizer, tasks()[:1], EvaluationSettings(against)).samples
    bare = log_prob(model, tokenizer, "Answer:", "cat")[0]
    assert samples[0]["candidates"]["cat"] == pytest.approx(scores["r0"]["cat"] - bare, abs=RELATIVE * abs(bare))


def greedy(model: Transformer, tokenizer: Tokenizer, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token == tokenizer.eos_id:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def test_written_answers(model: Transformer, tokenizer: Tokenizer) -> None:
    found = evaluate_tasks(model, tokenizer, tasks()[1:], EvaluationSettings(PROTOCOL))
    metric, values = rouge_l(), []
    for row, sample in zip(tasks()[1].records, found.samples, strict=True):
        prompt = [tokenizer.eos_id, *tokenizer.encode(f"Do it.\n\n{row.input}\nAnswer:")]
        answer = tokenizer.decode(greedy(model, tokenizer, prompt, 6)).strip()
        assert sample["answer"] == answer
        assert sample["metrics"]["rouge_l"] == metric(answer, row.targets)
        values.append(metric(answer, row.targets))
    (entry,) = found.results["tasks"].values()
    assert entry["metrics"]["rouge_l"]["value"] == pytest.approx(sum(values) / 3)
    prompts = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in ("the cat", "a", "the dog sat on the mat")]
    whole = write_answers(model, tokenizer, prompts, 6)
    assert write_answers(model, tokenizer, prompts, 6, batch_tokens=1) == whole
    text = next(answer.text for answer in whole if len(answer.text) > 3)
    (number,) = [i for i, answer in enumerate(whole) if answer.text == text][:1]
    stopped = write_answers(model, tokenizer, prompts, 6, stop=[text[2:4]])[number]
    assert stopped.text == text[: text.index(text[2:4])].strip()
    assert stopped.is_finished
    (row,) = generate(model, [prompts[number]], 6, eos_id=tokenizer.eos_id)
    ended = write_answers(model, tokenizer, prompts, 6, end_ids=(tokenizer.eos_id, row[1]))[number]
    assert ended == (tokenizer.decode(row[: row.index(row[1])]).strip(), True)


def test_answers_do_not_compete_for_experts(tokenizer: Tokenizer, tight_model: Callable[..., Transformer]) -> None:
    """With an evaluation capacity an answer would otherwise depend on those written beside it."""
    tight = tight_model(tokenizer.vocab_size, tie_embeddings=False)
    prompts = [[tokenizer.eos_id, *tokenizer.encode(text)] for text in ("the cat", "a", "the dog sat on the mat")]
    alone = [generate(tight, [prompt], 6, eos_id=tokenizer.eos_id)[0] for prompt in prompts]
    assert generate(tight, prompts, 6, eos_id=tokenizer.eos_id) != alone
    found = write_answers(tight, tokenizer, prompts, 6)
    assert [answer.text for answer in found] == [tokenizer.decode(row).strip() for row in alone]


def test_a_model_that_knows_the_answer(tokenizer: Tokenizer, model_config: Callable[..., ModelConfig]) -> None:
    """Overfitted to one task's targets, all its answers are right; of only four that shows nothing yet."""
    rows = [
        record(word, answer, candidates=("dog", "log"), example=word)
        for word, answer in (("cat", "dog"), ("mat", "log"), ("red", "dog"), ("ran", "log"))
    ]
    task = EvaluationTask("b/x", "b", "QA", 3, rows, rows)
    model = Transformer(model_config(vocab_size=tokenizer.vocab_size, max_seq_len=64, d_model=24))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    texts = [f"Do it.\n\n{row.input}\nAnswer:" for row in rows]
    for _ in range(60):
        loss = torch.zeros(())
        for text, row in zip(texts, rows, strict=True):
            before = 1 + len(tokenizer.encode(text))
            tokens = [tokenizer.eos_id, *tokenizer.encode(f"{text} {row.targets[0]}"), tokenizer.eos_id]
            logits = model(torch.tensor([tokens[:-1]])).logits[0]
            loss = loss + torch.nn.functional.cross_entropy(logits[before - 1 :], torch.tensor(tokens[before:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write = Protocol("write", (0,), rank=False, layout=Layout(), max_new_tokens=6)
    settings = [EvaluationSettings(PROTOCOL), EvaluationSettings(write)]
    ranked, written = (evaluate_tasks(model, tokenizer, [task], each).results for each in settings)
    assert ranked["tasks"]["b/x"]["metrics"]["accuracy"]["value"] == 1.0
    assert ranked["tasks"]["b/x"]["against_chance"]["accuracy"] == "not above"
    assert ranked["tasks"]["b/x"]["constant"]["accuracy"] == 0.5
    assert written["tasks"]["b/x"]["metrics"]["exact_match"]["value"] == 1.0
    assert written["tasks"]["b/x"]["details"]["num_unfinished"] == 0
    assert written["tasks"]["b/x"]["metrics"]["loss"] == ranked["tasks"]["b/x"]["metrics"]["loss"]


def test_shots_templates_and_counts(model: Transformer, tokenizer: Tokenizer) -> None:
    rows = [
        record(
            "", "dog", instruction=f"{lead} {i}?", style="instance", template=lead, example=f"e{i}", candidates=CHOICES
        )
        for i in range(4)
        for lead in ("the cat", "a mat")
    ]
    rows = [row._replace(candidates=CHOICES) for row in rows]
    task = EvaluationTask("b/x", "b", "QA", None, rows, rows)
    protocol = Protocol("test", num_shots=(0, 2), normalisation="unconditional")
    found = evaluate_tasks(model, tokenizer, [task], EvaluationSettings(protocol)).results
    assert list(found["tasks"]) == ["b/x 0-shot", "b/x 2-shot"]
    entry = found["tasks"]["b/x 2-shot"]
    assert entry["details"]["mean_shots"] == 2
    assert entry["metrics"]["accuracy"]["num_samples"] == 4  # raw examples
    assert entry["templates"].keys() == {"the cat", "a mat"}
    mean = sum(values["accuracy"] for values in entry["templates"].values()) / 2
    assert mean == pytest.approx(entry["metrics"]["accuracy"]["value"])
    assert {group["num_fewshot"] for group in found["groups"]} == {0, 2, None}
    other = task._replace(records=[rows[0]._replace(targets=("cat",)), *rows[1:]])
    changed = evaluate_tasks(model, tokenizer, [other], EvaluationSettings(protocol)).results["tasks"]
    assert found["tasks"]["b/x 0-shot"]["records_sha256"] == entry["records_sha256"]
    assert changed["b/x 0-shot"]["records_sha256"] != entry["records_sha256"]
    assert entry["against_chance"].keys() == {"accuracy", "loss"}


def test_super_natural_instructions_scores_by_category(model: Transformer, tokenizer: Tokenizer) -> None:
    rows = [record("a cat", "yes", candidates=("yes", "no"), example="0"), record("a dog", "no", example="1")]
    found = []
    for category in ("Textual Entailment", "Title Generation"):
        task = EvaluationTask(f"b/{category}", "b", category, 1, rows, rows)
        protocol = replace(find_protocol("super_natural_instructions"), num_shots=(0,), max_new_tokens=2)
        (entry,) = evaluate_tasks(model, tokenizer, [task], EvaluationSettings(protocol)).results["tasks"].values()
        found.append((entry["primary"], entry["details"]["num_ranked"]))
    assert found == [("exact_match", 0), ("rouge_l", 0)]


def test_rouge_of_another_script(model: Transformer, tokenizer: Tokenizer) -> None:
    """The answer to another question is the right one here, if its words are seen at all."""
    rows = [record(f"a {i}", "мир и мат", example=f"w{i}") for i in range(3)]
    task = EvaluationTask("b/x", "b", "QA", 2, rows, rows)
    protocol = Protocol("test", num_shots=(0,), max_new_tokens=2)
    for rouge, expected in (("words", 0.0), ("tokens", 1.0)):
        results = evaluate_tasks(model, tokenizer, [task], EvaluationSettings(protocol, rouge=rouge)).results
        assert results["tasks"]["b/x"]["chance"]["rouge_l"] == expected
    rows = [record(f"a {i}", answer, example=f"w{i}") for i, answer in enumerate("東京")]  # no byte in common
    task = EvaluationTask("b/x", "b", "QA", 2, rows, rows)
    results = evaluate_tasks(model, tokenizer, [task], EvaluationSettings(protocol, rouge="tokens")).results
    assert results["tasks"]["b/x"]["chance"]["rouge_l"] == 0.0


def test_settings() -> None:
    with pytest.raises(ValueError, match=r"rouge \('chars'\) must be one of: words, tokens"):
        EvaluationSettings(PROTOCOL, rouge="chars")
