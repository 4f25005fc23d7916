"""lm-eval's tasks on files: our adapter gives what lm-eval's own model gives for the same weights, for any batching."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import ModelConfig
from moe.evaluation.datasets import read
from moe.generation import generate
from moe.model import Transformer
from tests.ranks import run_ranks
from tests.shared_data import shared_data

lm_eval = pytest.importorskip("lm_eval", reason="the adapter is one of lm-eval (extra `eval`)")

from lm_eval.api.instance import Instance  # noqa: E402 - after the skip, as all below
from lm_eval.evaluator import evaluate  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from moe.evaluation.lm_eval_adapter import LmEvalModel  # noqa: E402
from moe.evaluation.lm_eval_run import EvaluationSettings, _metrics, run_lm_eval  # noqa: E402
from moe.evaluation.lm_eval_tasks import OWN_TASKS, data_from_files, load_tasks  # noqa: E402
from tests.moe.evaluation.twins import FastTokenizer, gpt2_pair, opt_pair, xglm_pair  # noqa: E402

CLOSE, CLOSE_FLOAT32 = 1e-12, 1e-5  # relative: rounding alone
TASKS = [
    *("blimp_adjunct_island", "lambada_validation", "copa", "boolq", "mnli", "piqa", "arc_easy", "arc_challenge"),
    *("openbookqa", "winogrande", "xcopa_et", "xcopa_zh", "xwinograd_en", "xwinograd_jp", "crows_pairs_english"),
    *("winogender_all", "mgsm_direct_de"),
]
FOLDERS = ["blimp", "super_glue", "glue", "piqa", "arc", "openbookqa", "winogrande", "xcopa", "xwinograd", "mgsm"]
FOLDERS += ["crows_pairs", "winogender"]
SENTENCES = [
    "the cat sat on the mat because it was warm and soft. ",
    "a man turned on the tap, so water ran out of it. ",
]


@pytest.fixture(scope="module")
def manager() -> TaskManager:
    """Of the folders that are used: all of lm-eval's take ten times as long to read."""
    root = Path(lm_eval.__file__).parent / "tasks"
    return TaskManager(include_defaults=False, include_path=[str(root / name) for name in FOLDERS] + [str(OWN_TASKS)])


@pytest.fixture(scope="module")
def tokenizer() -> FastTokenizer:
    pytest.importorskip("tokenizers", reason="one tokenizer for both models")
    return FastTokenizer(SENTENCES * 4, 320)


def cloze(folder: Path, rows: list[dict[str, Any]], split: str = "validation") -> Path:
    """COPA in the Hub's own form."""
    path = folder / "aps/super_glue/copa" / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def copa_rows(count: int) -> list[dict[str, Any]]:
    words = ["cat", "man", "tap", "mat", "water", "sun"]
    return [
        {
            "premise": f"The {words[i % 6]} was seen by {words[(i * 5 + 1) % 6]} {i}.",
            "choice1": f"It was {'very ' * (i % 4)}warm.",
            "choice2": f"The {words[(i * 7 + 2) % 6]} ran out.",
            "question": ("cause", "effect")[i % 2],
            "idx": i,
            "label": (i * 3 // 2) % 2,
        }
        for i in range(count)
    ]


def small(model_config: Callable[..., ModelConfig], vocab_size: int, **options: Any) -> Transformer:
    model = Transformer(model_config(vocab_size=vocab_size, max_seq_len=96, **options), dtype=torch.float64)
    model.reset_parameters(seed=3)
    with torch.no_grad():
        model.embedding.weight.mul_(25)
    return model.eval()


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def hf_model(theirs: Any, tokenizer: FastTokenizer) -> Any:
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=theirs, tokenizer=tokenizer.for_transformers(), batch_size=8, max_length=256)


def test_every_listed_task_scores_as_with_lm_evals_own_model(manager: TaskManager, tokenizer: FastTokenizer) -> None:
    """17 tasks of 15 data sets on the real files: log-likelihoods, greedy flags, generated texts and scores."""
    folder = shared_data("")
    ours, theirs = opt_pair(tokenizer.vocab_size)
    adapter, reference = LmEvalModel(ours, tokenizer, beginning="none"), hf_model(theirs, tokenizer)
    with data_from_files(folder) as files:
        loaded = load_tasks(TASKS, None, 1234, manager)
    generation = loaded["tasks"]["mgsm_direct_de"]
    generation.set_config(key="generation_kwargs", value={"max_gen_toks": 12}, update=True)
    found, expected = (evaluate(model, loaded, limit=4, bootstrap_iters=0) for model in (adapter, reference))
    assert set(TASKS) == set(found["results"])
    for name in TASKS:
        for metric, value in expected["results"][name].items():
            actual = found["results"][name][metric]
            assert actual == (pytest.approx(value, rel=CLOSE) if isinstance(value, float) else value), (name, metric)
        for sample, other in zip(found["samples"][name], expected["samples"][name], strict=True):
            for (answer,), (right,) in zip(sample["resps"], other["resps"], strict=True):
                if name == "mgsm_direct_de":
                    assert answer == right
                else:
                    assert answer == (pytest.approx(right[0], rel=CLOSE), right[1])
    assert adapter.counts["loglikelihood"].truncated > 0  # long passages: the rule is lm-eval's
    assert {name.rsplit("/", 1)[0] for name in files} >= {"aps/super_glue/copa", "juletxara/mgsm/de", "cimec/lambada"}


@pytest.mark.parametrize("pair", [opt_pair, gpt2_pair, xglm_pair])
def test_few_shot_scores_as_with_lm_evals_own_model(
    manager: TaskManager, tokenizer: FastTokenizer, pair: Callable[..., tuple[Transformer, Any]]
) -> None:
    folder = shared_data("")
    ours, theirs = pair(tokenizer.vocab_size)
    adapter = LmEvalModel(ours, tokenizer, beginning="none", min_prefix=8)
    with data_from_files(folder):
        loaded = load_tasks(["copa"], 2, 7, manager)
        other = load_tasks(["copa"], 2, 7, manager)
    found = evaluate(adapter, loaded, limit=12, bootstrap_iters=0)
    expected = evaluate(hf_model(theirs, tokenizer), other, limit=12, bootstrap_iters=0)
    assert found["n-shot"] == {"copa": 2}
    for sample, right in zip(found["samples"]["copa"], expected["samples"]["copa"], strict=True):
        assert sample["arguments"] == right["arguments"]
        for ((a, _),), ((b, _),) in zip(sample["resps"], right["resps"], strict=True):
            assert a == pytest.approx(b, rel=CLOSE if ours.embedding.weight.dtype == torch.float64 else CLOSE_FLOAT32)


def test_rolling_and_stopped_generation_as_with_lm_evals_own_model(tokenizer: FastTokenizer) -> None:
    ours, theirs = opt_pair(tokenizer.vocab_size)
    adapter, reference = LmEvalModel(ours, tokenizer, beginning="none"), hf_model(theirs, tokenizer)
    texts = [("".join(SENTENCES) * 24,), ("the cat",), ("".join(SENTENCES) * 3,)]
    assert len(tokenizer.encode(texts[0][0])) > 2 * adapter.max_length > 2 * len(tokenizer.encode(texts[2][0]))
    rolled = [model.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for model in (adapter, reference)]
    assert rolled[0] == pytest.approx(rolled[1], rel=CLOSE)
    free = {"until": [], "max_gen_toks": 20}
    prompts = [("the cat sat", free), ("a man turned on the tap, so", free), ("water", free)]
    whole, right = (model.generate_until(instances("generate_until", prompts)) for model in (adapter, reference))
    assert whole == right
    assert all(whole)
    stop = whole[0][2:4]
    stopped = adapter.generate_until(instances("generate_until", [("the cat sat", {**free, "until": [stop, "zzz"]})]))
    assert stopped == [whole[0].split(stop)[0]]


def test_written_texts_end_at_any_of_the_end_tokens(tokenizer: FastTokenizer) -> None:
    model, _ = opt_pair(tokenizer.vocab_size)
    asked = instances("generate_until", [("the cat sat", {"until": [], "max_gen_toks": 8})])
    prompt = [tokenizer.eos_id, *tokenizer.encode("the cat sat")]
    (written,) = generate(model, [prompt], 8)
    count = max(i for i in range(8) if written[i] not in written[:i])
    ends = (tokenizer.eos_id, written[count])
    assert LmEvalModel(model, tokenizer, end_ids=ends).generate_until(asked) == [tokenizer.decode(written[:count])]
    assert LmEvalModel(model, tokenizer).generate_until(asked) != [tokenizer.decode(written[:count])]


def test_a_diverged_model_is_refused(model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer) -> None:
    """Choices among NaN would be a score, of the first candidate."""
    model = small(model_config, tokenizer.vocab_size)
    with torch.no_grad():
        model.final_norm.weight[0] = math.nan
    adapter = LmEvalModel(model, tokenizer, min_prefix=8)
    for kind, pairs in (
        ("loglikelihood", [("the cat", " sat"), ("the cat", " ran")]),
        ("loglikelihood_rolling", [("the cat sat",)]),
    ):
        with pytest.raises(ValueError, match="hold NaN: the model has diverged; take an earlier checkpoint"):
            getattr(adapter, kind)(instances(kind, pairs))


def test_a_perplexity_that_lm_eval_cannot_compute_is_one_error(
    manager: TaskManager, model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    model = small(model_config, tokenizer.vocab_size)
    with torch.no_grad():
        model.embedding.weight.mul_(3e5)
    settings = EvaluationSettings(("lambada_validation",), shared_data(""), limit=3)
    with pytest.raises(ValueError, match=r"a perplexity is larger than a float can hold: .*the model has diverged"):
        run_lm_eval(model, tokenizer, settings, manager=manager)


def test_figures_that_json_cannot_hold_are_left_out() -> None:
    """A perplexity may overflow, in its value or in one draw, after hours of work that are not to be lost."""

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    class Task:
        def aggregation(self) -> dict[str, Any]:
            return {"acc": mean, "perplexity": lambda values: math.exp(sum(values) / len(values))}

    settings = EvaluationSettings(("x",), resamples=50)
    for nats in ([800.0] * 3, [1400.0, 1.0, 1.0], [math.inf] * 3):
        samples = [
            {"filter": "none", "doc_id": i, "metrics": ["acc", "perplexity"], "acc": 1.0, "perplexity": value}
            for i, value in enumerate(nats)
        ]
        assert list(_metrics(Task(), samples, settings)) == ["acc"]


def test_rolling_is_the_sum_of_the_models_own_losses(
    model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    """A text that fits the window, and one that does not: every token once, the last window with all context."""
    model = small(model_config, tokenizer.vocab_size)
    adapter = LmEvalModel(model, tokenizer)
    for text in (SENTENCES[0], "".join(SENTENCES) * 4):
        tokens = [tokenizer.eos_id, *tokenizer.encode(text)]
        length, expected, done = adapter.max_length, 0.0, 1
        while done < len(tokens):
            end = min(len(tokens), done + length)
            window = torch.tensor([tokens[max(0, end - 1 - length) : end]])
            losses = model(window[:, :-1], window[:, 1:].contiguous()).token_losses.double()[0]
            expected -= losses[-(end - done) :].sum().item()
            done = end
        (actual,) = adapter.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,)]))
        assert actual == pytest.approx(expected, rel=1e-6)  # token losses are float32


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
def test_batches_order_and_shared_prefixes_change_no_score(
    model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer, sparse: bool
) -> None:
    model = small(model_config, tokenizer.vocab_size, sparse=sparse)
    shots = "".join(SENTENCES)
    pairs = [(shots + f"question {i}. ", word) for i in range(7) for word in (" warm", " it was soft", " and")]
    pairs += [("", "the cat"), ("the cat", " sat"), (pairs[0][0], pairs[0][1]), (shots * 3, " cut on the left")]
    answers, forward = {}, {}
    for name, options in {
        "plain": {"min_prefix": 10**6},
        "shared": {"min_prefix": 8},
        "one by one": {"min_prefix": 10**6, "batch_tokens": 1},
        "shared, small": {"min_prefix": 8, "batch_tokens": 200},
    }.items():
        adapter = LmEvalModel(model, tokenizer, **options)
        answers[name] = adapter.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
        forward[name] = adapter.counts["loglikelihood"].forward_tokens
    backwards = LmEvalModel(model, tokenizer, min_prefix=8).loglikelihood(
        instances("loglikelihood", pairs[::-1]), disable_tqdm=True
    )
    answers["backwards"] = backwards[::-1]
    for name, found in answers.items():
        for (actual, greedy), (expected, right) in zip(found, answers["plain"], strict=True):
            assert actual == pytest.approx(expected, rel=CLOSE), name
            assert greedy == right
    assert len({value for value, _ in answers["plain"]}) == len(pairs) - 1
    assert forward["shared"] < 0.4 * forward["plain"] == 0.4 * forward["one by one"]


def test_a_scored_continuation_is_what_the_logits_say(
    model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    """Truncation keeps the end of the context and the whole continuation, and is counted."""
    model = small(model_config, tokenizer.vocab_size, sparse=True)
    adapter = LmEvalModel(model, tokenizer)
    context, continuation = ("".join(SENTENCES) * 4).strip(), " and the cat sat on it"
    ((actual, greedy),) = adapter.loglikelihood(
        instances("loglikelihood", [(context, continuation)]), disable_tqdm=True
    )
    tokens = [tokenizer.eos_id, *tokenizer.encode(context + continuation)]
    count = len(tokens) - 1 - len(tokenizer.encode(context))
    kept = torch.tensor([tokens[-(adapter.max_length + 1) :]])
    log_probs = model(kept[:, :-1]).logits[0].log_softmax(-1).detach()
    expected = log_probs.gather(1, kept[0, 1:, None])[-count:, 0]
    assert actual == pytest.approx(float(expected.sum()), rel=CLOSE)
    assert greedy == bool((log_probs[-count:].argmax(-1) == kept[0, -count:]).all())
    assert adapter.request_counts()["loglikelihood"]["truncated"] == 1
    likeliest, *_, unlikeliest = model(kept[:, 1:]).logits[0, -1].argsort(descending=True).tolist()
    following = [(None, tokens, [token]) for token in (likeliest, unlikeliest)]
    assert [is_best for _, is_best in adapter._loglikelihood_tokens(following)] == [True, False]


def test_swapped_choices_flip_and_shuffled_labels_give_chance(
    tmp_path: Path, manager: TaskManager, model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    model, rows = small(model_config, tokenizer.vocab_size), copa_rows(60)
    swapped = [row | {"choice1": row["choice2"], "choice2": row["choice1"]} for row in rows]

    def picks(name: str, given: list[dict[str, Any]]) -> tuple[list[int], float]:
        settings = EvaluationSettings(("copa",), cloze(tmp_path / name, given), resamples=20)
        found = run_lm_eval(model, tokenizer, settings, manager=manager)
        chosen = [int(s["resps"][1][0][0] > s["resps"][0][0][0]) for s in found.samples["copa"]]
        return chosen, found.results["tasks"]["copa"]["metrics"]["acc"]["value"]

    chosen, accuracy = picks("given", rows)
    assert 0 < sum(chosen) < len(rows)
    flipped, after = picks("swapped", swapped)
    assert flipped == [1 - choice for choice in chosen]
    assert after == pytest.approx(1 - accuracy)
    right = [row | {"label": choice} for row, choice in zip(rows, chosen, strict=True)]
    assert picks("right", right)[1] == 1.0
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [row | {"label": right[i]["label"]} for row, i in zip(rows, order, strict=True)]
    p = sum(chosen) / len(chosen)
    expected, deviation = p * p + (1 - p) ** 2, (0.25 / len(rows)) ** 0.5
    assert abs(picks("shuffled", shuffled)[1] - expected) < 3 * deviation


def test_the_order_of_samples_changes_no_interval() -> None:
    """lm-eval gives samples in an order of its own, and the bootstrap draws places: they are those of the file."""

    class Task:
        def aggregation(self) -> dict[str, Any]:
            return {"acc": mean}

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    samples = [{"filter": "none", "doc_id": i, "metrics": ["acc"], "acc": float(i * i % 7 < 3)} for i in range(40)]
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    settings = EvaluationSettings(("x",), resamples=200)
    expected = _metrics(Task(), samples, settings)
    assert _metrics(Task(), [samples[i] for i in order], settings) == expected
    assert expected["acc"]["low"] < expected["acc"]["high"]


def test_a_group_is_the_mean_of_its_tasks_and_own_files_are_tasks(
    tmp_path: Path, model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    root = Path(lm_eval.__file__).parent / "tasks"
    task = (root / "super_glue/copa/default.yaml").read_text().replace("task: copa", "task: copa_again")
    (tmp_path / "again.yaml").write_text(task.replace("validation_split: validation", "validation_split: train"))
    (tmp_path / "utils.py").write_text((root / "super_glue/copa/utils.py").read_text())
    (tmp_path / "pair.yaml").write_text(
        "group: pair\ntask: [copa, copa_again]\naggregate_metric_list:\n  - {metric: acc, weight_by_size: true}\n"
    )
    manager = TaskManager(include_defaults=False, include_path=[str(root / "super_glue"), str(tmp_path)])
    cloze(cloze(tmp_path, copa_rows(30)), copa_rows(10), "train")
    settings = EvaluationSettings(("pair",), tmp_path, resamples=50)
    results = run_lm_eval(small(model_config, tokenizer.vocab_size), tokenizer, settings, manager=manager).results
    figures = {name: task["metrics"]["acc"] for name, task in results["tasks"].items()}
    assert {name: figure["num_samples"] for name, figure in figures.items()} == {"copa": 30, "copa_again": 10}
    mean = (30 * figures["copa"]["value"] + 10 * figures["copa_again"]["value"]) / 40
    assert results["groups"] == {"pair": {"acc": pytest.approx(mean)}}
    json.dumps(results, allow_nan=False)


def _evaluate_on_ranks(world: Any, folder: str, root: str, state: dict[str, Any], config: ModelConfig) -> Any:
    model = Transformer(config, dtype=torch.float64)
    model.load_state_dict(state)
    tokenizer = FastTokenizer(SENTENCES * 4, 320)
    manager = TaskManager(include_defaults=False, include_path=[root])
    settings = EvaluationSettings(("copa",), Path(folder), num_fewshot=1, batch_tokens=300, resamples=20)
    found = run_lm_eval(model.eval(), tokenizer, settings, world=world, manager=manager)
    adapter = LmEvalModel(model, tokenizer, world=world, batch_tokens=60)
    prompts: list[tuple[Any, ...]] = [("the cat", {"max_gen_toks": 5, "until": []}), ("a man", {"max_gen_toks": 7})]
    prompts += [("the mat", {"max_gen_toks": 6, "do_sample": True, "temperature": 1.0})] * 2
    texts = adapter.generate_until(instances("generate_until", prompts))
    return found.results["tasks"], [sample["resps"] for sample in found.samples["copa"]], texts


def test_two_ranks_give_the_same_bits(
    tmp_path: Path, model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    """The whole way; test_shared_prefixes.py has more ranks, which need not import lm-eval."""
    model = small(model_config, tokenizer.vocab_size, sparse=True)
    folder = cloze(cloze(tmp_path, copa_rows(9)), copa_rows(5), "train")
    root = str(Path(lm_eval.__file__).parent / "tasks/super_glue")
    arguments = (str(folder), root, model.state_dict(), model.config)
    alone = _evaluate_on_ranks(None, *arguments)
    for found in run_ranks(_evaluate_on_ranks, 2, *arguments):
        assert found == alone
    assert alone[2][2] != alone[2][3]  # two samples of one prompt are two draws


@pytest.fixture
def copa_folder(tmp_path: Path) -> Iterator[Path]:
    yield cloze(tmp_path, copa_rows(4))


def test_bad_requests_are_refused(
    copa_folder: Path, manager: TaskManager, model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer
) -> None:
    import datasets

    model = small(model_config, tokenizer.vocab_size)

    def run(**changes: Any) -> Any:
        settings = EvaluationSettings(("copa",), copa_folder, resamples=2)._replace(**changes)
        return run_lm_eval(model, tokenizer, settings, manager=manager)

    original = datasets.load_dataset
    run()  # zero-shot needs no training split
    with pytest.raises(ValueError, match=r"no file with split 'train' of aps/super_glue \(copa\)"):
        run(num_fewshot=1)
    with pytest.raises(ValueError, match=r"no file with split 'validation' of baber/piqa"):
        run(tasks=("piqa",))
    with pytest.raises(ValueError, match=r"has no task, group or tag 'xcopa_xx'; beginning alike: xcopa, xcopa_et"):
        run(tasks=("xcopa_xx",))
    with pytest.raises(ValueError, match=r"'aps/super_glue'.*wic|has no subset 'wic' that can be read"):
        run(tasks=("wic",))
    with pytest.raises(ValueError, match=r"limit \(0\) must be at least 1"):
        run(limit=0)
    with pytest.raises(ValueError, match=r"beginning \('bos'\) must be one of: auto, none"):
        run(beginning="bos")
    assert datasets.load_dataset is original
    read("aps/super_glue", "copa", "validation", copa_folder)
    with pytest.raises(ValueError, match="cannot be read from files"), data_from_files(copa_folder):
        datasets.load_dataset("someone/else")


def test_bad_texts_are_refused(model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer) -> None:
    model = small(model_config, tokenizer.vocab_size)
    adapter = LmEvalModel(model, tokenizer)
    with pytest.raises(ValueError, match=r"has no token of its own"):
        adapter.loglikelihood(instances("loglikelihood", [("the cat", "")]), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"is longer than model\.max_seq_len \(96\), and what is scored is never cut"):
        adapter.loglikelihood(instances("loglikelihood", [("the", " cat sat" * 60)]), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"generation_kwargs hold num_beams, not supported here; supported are"):
        adapter.generate_until(instances("generate_until", [("the", {"num_beams": 2})]))
    with pytest.raises(ValueError, match=r"up to 96 tokens, which leaves no room"):
        adapter.generate_until(instances("generate_until", [("the", {"max_gen_toks": 96})]))
    with pytest.raises(ValueError, match=r"tokenizer has \d+ tokens, more than the model's vocab_size \(37\)"):
        LmEvalModel(Transformer(model_config()), tokenizer)


def test_what_stands_before_a_context(model_config: Callable[..., ModelConfig], tokenizer: FastTokenizer) -> None:
    model = small(model_config, tokenizer.vocab_size)
    auto, none = LmEvalModel(model, tokenizer), LmEvalModel(model, tokenizer, beginning="none")
    assert auto.tok_encode("the cat") == [tokenizer.eos_id, *none.tok_encode("the cat")]
    pairs = [("the", " cat"), ("", "the cat")]
    (with_start, empty), (without, empty_too) = (
        adapter.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for adapter in (auto, none)
    )
    assert with_start != without
    assert empty == empty_too
