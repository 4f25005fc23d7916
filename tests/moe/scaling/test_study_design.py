"""From a study's YAML to its models and runs, without training any."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from moe.config.study import StudyConfig
from moe.scaling.flops import flops_per_token
from moe.scaling.report import page
from moe.scaling.study import files, runs, sweep
from moe.scaling.study.design import Design, derive, unbracketed
from moe.scaling.study.manifest import write_manifest

STUDIES = sorted(path.stem for path in (Path(__file__).parents[3] / "configs/study").glob("*.yaml"))
SMALL = """
name: small
design: {design}
tokens: [8192]
overrides: [data=python, train.batch_tokens=1024, data.vocab_size=512]
sizes:
  a: {{overrides: [model=ladder_64], experts: [4, 16], seeds: [0, 1]}}
  b: {{overrides: [model=ladder_128], experts: [16]}}
sparse_overrides: ["+moe=8e", "model.moe.name={{experts}}e", "model.moe.num_experts={{experts}}"]
"""


def read(tmp_path: Path, *overrides: str, design: str = "frontier", text: str = SMALL) -> StudyConfig:
    path = tmp_path / "small.yaml"
    path.write_text(text.format(design=design))
    return files.read_study(str(path), [f"folder={tmp_path / 'study'}", *overrides])


@lru_cache
def derived(design: str = "frontier", text: str = SMALL, *overrides: str) -> tuple[StudyConfig, Design]:
    """Composing a study's models costs seconds: tests that only look at them share them."""
    with TemporaryDirectory() as folder:
        study = read(Path(folder), *overrides, design=design, text=text)
        return study, derive(study)


def test_frontier_pairs_are_twins_of_one_shape() -> None:
    _, design = derived()
    assert [(arm.size, arm.name) for arm in design.arms] == [
        *(("a", name) for name in ("dense", "4e", "16e")),
        *(("b", name) for name in ("dense", "16e")),
    ]
    for pair in design.pairs:
        assert pair.sparse.config.model.expert_width == pair.dense.config.model.d_ff
        assert pair.sparse.config.model.d_model == pair.dense.config.model.d_model
        assert 0.05 < pair.difference < 0.3  # the second expert and the router
    for arm in design.arms:
        model = arm.config.model
        assert arm.flops_per_token == flops_per_token(model, 256).training
        assert model.vocab_size == 512


@pytest.mark.parametrize("vary", ["experts", "dense"])
def test_matched_pairs_have_equal_flops(vary: str) -> None:
    _, design = derived("matched", SMALL, f"vary={vary}")
    assert len(design.pairs) == 3
    for pair in design.pairs:
        dense, sparse = (flops_per_token(arm.config.model, 256).training for arm in (pair.dense, pair.sparse))
        assert abs(sparse / dense - 1) <= 0.01
        assert pair.difference == pytest.approx(sparse / dense - 1, abs=1e-12)
    names = {arm.name for arm in design.arms}
    assert names == ({"dense", "4e", "16e"} if vary == "experts" else {"dense_4e", "dense_16e", "4e", "16e"})


def test_recomputation_is_counted() -> None:
    """A layer that is computed twice costs; arms with other shares of it are matched with it."""
    _, plain = derived("matched", SMALL, "vary=experts")
    _, again = derived("matched", SMALL.replace("data=python,", "data=python, train.recompute=true,"))
    assert again.pairs[0].dense.flops_per_token > 1.1 * plain.pairs[0].dense.flops_per_token
    assert abs(again.pairs[0].difference) <= 0.01


def test_a_pair_that_cannot_be_matched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the pair a: 4e cannot be matched: model\.expert_d_ff=512 comes nearest"):
        derive(read(tmp_path, "width_multiple=512", design="matched"))


def test_experts_that_cost_too_much_cannot_be_matched(tmp_path: Path) -> None:
    """With a router as large as the network, no width of experts is small enough."""
    text = SMALL.replace("experts: [4, 16]", "experts: [4096]")
    with pytest.raises(ValueError, match=r"4096e cannot be matched: model\.expert_d_ff=8 comes nearest"):
        derive(read(tmp_path, design="matched", text=text))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"+moe=8e",', '"+moe=8e", optim.lr=0.1,', r"differ in optim\.lr: .* move it from sparse_overrides"),
        ('"+moe=8e",', '"+moe=8e", train.batch_tokens=2048,', r"differ in train\.batch_tokens"),
        ("data=python,", "data=python, model.expert_d_ff=64,", "design=frontier sets it for every run"),
        ("data=python,", "data=python, seed=3,", "seed=3 of the study"),
        ("data=python,", "data=python, +moe=8e,", "should have no experts"),
        ('"model.moe.num_experts={{experts}}"', "", "has 8 experts, not 4"),
        ("data=python,", "data=python, optim.lrr=1,", r"there is no key 'optim\.lrr'"),
        ("data=python,", "data=text, 'data.path={{data_folder}}/x',", "needs data_folder"),
        ("data=python,", "data=python, data.tokenizer=somewhere,", r"model\.vocab_size must be stated"),
    ],
)
def test_unfair_or_wrong_studies_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in SMALL
    with pytest.raises(ValueError, match=words):
        derive(read(tmp_path, text=SMALL.replace(old, new)))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("design=fair", r"design \('fair'\) must be one of: frontier, matched"),
        ("jobs=0", r"study\.jobs \(0\) must be above 0"),
        ("tokens=[]", "at least one entry"),
        ("tokens=[-5]", r"tokens \(-5, of size a\) must be above 0"),
        ("tolerance=2", "must be between 0 and 1"),
        ("sizes.a.seeds=[]", "at least one seed"),
        ("sizes={x/y: {}}", r"sizes\.'x/y' becomes part of file names"),
        ("sizes.a.seeds=[1,2,1]", r"sizes\.\*\.seeds has 1 twice"),
        ("sizes.a.experts=[4,4]", r"sizes\.\*\.experts has 4 twice"),
        ("tokens=[8192,8192]", r"study\.tokens has 8192 twice"),
        ("sweep={size: a, grid: {optim.lr: [1.0, 2.0, 1.0]}}", r"sweep\.grid\.optim\.lr has 1\.0 twice"),
        ("sweep={size: a, seeds: [0, 0], grid: {optim.lr: [1.0]}}", r"sweep\.seeds has 0 twice"),
        ("tokenz=[3]", "tokenz"),
        ("jobs", "they are written key=value"),
        ("sweep={size: c, grid: {optim.lr: [1.0]}}", r"sweep\.size \(c\) must be one of sizes: a, b"),
    ],
)
def test_wrong_fields(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(tmp_path, override)


def test_a_sweep_is_of_the_optimizer_alone(tmp_path: Path) -> None:
    for grid, words in (("{data.vocab_size: [1.0]}", "must be a field of optim"), ("{}", "at least one value")):
        with pytest.raises(ValueError, match=words):
            read(tmp_path, text=f"{SMALL}sweep: {{{{size: a, grid: {grid.replace('{', '{{').replace('}', '}}')}}}}}")


def test_a_study_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"there is no study 'nothing'.*smoke"):
        files.read_study("nothing")
    with pytest.raises(ValueError, match="not a file that exists"):
        files.read_study("nothing.yaml")


@pytest.mark.parametrize("content", [b"name: x\n  bad: [\n", b"\xff\xfe"])
def test_a_file_that_is_no_yaml_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "small.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"small\.yaml: this is no YAML: [^\n]+$"):
        files.read_study(str(path))
    with pytest.raises(ValueError, match="the study's overrides: this is no YAML"):
        files.read_study("smoke", ["tokens=["])


SWEEP = (
    SMALL
    + "sweep: {{size: a, width_power: -1.0, seeds: [7], grid: {{optim.lr: [0.001, 0.004], optim.beta2: [0.9, 0.95]}}}}"
)
SECOND = (
    SMALL + "sweep: {{size: a, second: {{size: b, grid: {{optim.lr: [0.002], optim.embedding_lr_scale: [4.0, 8.0]}}}}, "
    "grid: {{optim.lr: [0.004, 0.008], optim.embedding_lr_scale: [2.0, 4.0]}}}}"
)


def complete(folder: Path, run: runs.Run, loss: float) -> None:
    run_dir = folder / "runs" / run.name
    run_dir.mkdir(parents=True)
    domains = {"docs": {"cross_entropy": loss, "num_tokens": 10}, "code": {"cross_entropy": loss + 1, "num_tokens": 30}}
    worse = {"docs": {"cross_entropy": -loss, "num_tokens": 10}}
    tree = {"splits": {"validation": {"domains": domains}, "test": {"domains": worse}}}
    (run_dir / "results.json").write_text(json.dumps(tree))


def test_every_arm_is_swept_alike_and_the_validation_split_chooses(tmp_path: Path) -> None:
    study, design = derived("frontier", SWEEP)
    folder = tmp_path / "study"
    swept = runs.sweep_runs(study, design, folder)
    assert len(swept) == 3 * 4
    by_arm = {arm: [run.optim for run in swept if run.arm.name == arm] for arm in ("dense", "4e", "16e")}
    assert by_arm["dense"] == by_arm["4e"] == by_arm["16e"]
    with pytest.raises(ValueError, match="the run is not complete"):
        runs.choose(study, design, folder)
    for run in swept:
        wanted = {"dense": 3, "4e": 0, "16e": 2}[run.arm.name]
        complete(folder, run, 2.0 if run.candidate == wanted else 2.5)
    chosen = runs.choose(study, design, folder)
    assert chosen["dense"]["optim"] == {"optim.lr": 0.004, "optim.beta2": 0.95}
    assert chosen["4e"]["optim"] == {"optim.lr": 0.001, "optim.beta2": 0.9}
    assert chosen["dense"]["edge"] == ["optim.lr", "optim.beta2"]
    assert chosen["dense"]["scores"][3]["validation_cross_entropy"] == pytest.approx(2.75)  # by tokens, not by domains
    main = runs.main_runs(study, design, folder, {arm: winner["optim"] for arm, winner in chosen.items()})
    rates = {(run.arm.size, run.arm.name): run.config.optim.lr for run in main}
    assert rates["a", "dense"] == 0.004 and rates["b", "dense"] == 0.002  # twice the width, power -1
    assert rates["a", "16e"] == 0.004 and rates["b", "16e"] == 0.002
    assert "optim.lr=0.002" in next(run for run in main if run.name == "b-dense-t8.192k-s0").overrides


def test_the_power_of_the_width_is_measured_between_two_sizes(tmp_path: Path) -> None:
    """Size b is twice as wide as a: a winner of half the rate is a power of -1, of four times the scale one of 2."""
    study, design = derived("frontier", SECOND)
    folder = tmp_path / "study"
    swept = runs.sweep_runs(study, design, folder)
    assert len(swept) == 3 * 4 + 2 and [run.name for run in swept[-2:]] == [f"sweep-b-dense-c{n}-s0" for n in (0, 1)]
    for run in swept:
        complete(folder, run, 2.0 if run.candidate == {"a": 0, "b": 1}[run.arm.size] else 2.5)
    chosen = {name: winner["optim"] for name, winner in runs.choose(study, design, folder).items()}
    assert chosen["dense at b"] == {"optim.lr": 0.002, "optim.embedding_lr_scale": 8.0}
    assert sweep.width_powers(study, design, chosen) == pytest.approx(
        {"optim.lr": -1.0, "optim.embedding_lr_scale": 2.0}
    )
    main = runs.main_runs(study, design, folder, {**chosen, "4e": {"optim.lr": 0.01, "optim.embedding_lr_scale": 3.0}})
    found = {run.name: (run.config.optim.lr, run.config.optim.embedding_lr_scale) for run in main if run.seed == 0}
    assert found["a-dense-t8.192k-s0"] == (0.004, 2.0)
    assert found["b-dense-t8.192k-s0"] == pytest.approx((0.002, 8.0))
    assert found["a-4e-t8.192k-s0"] == (0.01, 3.0)
    rule = sweep.transfer_rule(study, design, chosen)
    assert "optim.lr times (d_model / that of a)^-1" in rule and "between the dense winners at a and b" in rule
    assert "powers of the width" in sweep.transfer_rule(study, design, {})


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("second: {{size: b", "second: {{size: a", "another size"),
        ("second: {{size: b", "second: {{size: z", r"sweep\.second\.size \(z\) must be one of sizes"),
        ("size: a, second", "size: a, width_power: -1.0, second", "give only one"),
        ("[0.002]", "[0.0]", r"optim\.lr \(0\.0\) must be above 0"),
        ("{{optim.lr: [0.002], ", "{{", "must have the fields of sweep.grid"),
    ],
)
def test_a_second_sweep_that_measures_nothing(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert old in SECOND
    with pytest.raises(ValueError, match=words):
        read(tmp_path, text=SECOND.replace(old, new))


def test_a_second_size_needs_a_dense_model(tmp_path: Path) -> None:
    study, design = derived("frontier", SECOND)
    arms = tuple(arm for arm in design.arms if (arm.size, arm.name) != ("b", "dense"))
    with pytest.raises(ValueError, match="must both have a dense model"):
        runs.sweep_runs(study, replace(design, arms=arms), tmp_path)


def test_two_sizes_of_one_width_measure_no_power(tmp_path: Path) -> None:
    study = read(tmp_path, text=SECOND.replace("model=ladder_128", "model=ladder_64, model.num_layers=2"))
    with pytest.raises(ValueError, match="are both 64 wide"):
        runs.sweep_runs(study, derive(study), tmp_path)


def test_a_damaged_result_of_the_sweep_is_an_error(tmp_path: Path) -> None:
    study, design = derived("frontier", SWEEP)
    folder = tmp_path / "study"
    for run in runs.sweep_runs(study, design, folder):
        complete(folder, run, 2.0)
    path = folder / "runs" / "sweep-a-4e-c1-s7" / "results.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"is damaged .* delete .*sweep-a-4e-c1-s7 to train it again"):
        runs.choose(study, design, folder)


def test_a_candidate_that_diverged_is_not_chosen(tmp_path: Path) -> None:
    """`moe train` writes null for a loss that is not finite; study.json and the report take it."""
    study, design = derived("frontier", SWEEP)
    folder = tmp_path / "study"
    swept = runs.sweep_runs(study, design, folder)
    for run in swept:
        complete(folder, run, 2.0)
    diverged = [run for run in swept if run.arm.name == "4e"]
    for run in diverged[:3]:
        path = folder / "runs" / run.name / "results.json"
        path.write_text(path.read_text().replace('"cross_entropy": 2.0', '"cross_entropy": null'))
    chosen = runs.choose(study, design, folder)
    assert chosen["4e"]["optim"] == diverged[3].optim
    assert [score["validation_cross_entropy"] for score in chosen["4e"]["scores"]] == [None, None, None, 2.75]
    write_manifest(folder, study, design, swept, chosen, {})
    assert page._sweep(json.loads((folder / "study.json").read_text())).count("<td>diverged</td>") == 3
    path = folder / "runs" / diverged[3].name / "results.json"
    path.write_text(path.read_text().replace('"cross_entropy": 2.0', '"cross_entropy": null'))
    with pytest.raises(ValueError, match="every candidate of the sweep of 4e diverged"):
        runs.choose(study, design, folder)


def test_a_sweep_needs_every_arm_at_its_size(tmp_path: Path) -> None:
    study = read(tmp_path, text=SWEEP.replace("size: a, width", "size: b, width"))
    with pytest.raises(ValueError, match=r"sweep\.size \(b\) has no 4e"):
        runs.sweep_runs(study, derived()[1], tmp_path)


def test_twins_read_the_same_batches(tmp_path: Path) -> None:
    """A batch is a function of the text, the seed, the step and its size: those are alike in both arms."""
    study, design = derived()
    main = runs.main_runs(study, design, tmp_path, {})
    assert len(main) == 2 * 3 + 2
    for seed in (0, 1):
        of_size = [run.config for run in main if run.arm.size == "a" and run.seed == seed]
        assert len(of_size) == 3
        for config in of_size:
            assert (config.seed, config.train, config.data, config.optim) == (
                seed,
                of_size[0].train,
                of_size[0].data,
                of_size[0].optim,
            )
    assert all(run.num_steps == 8 and run.tokens == 8192 for run in main)
    assert [run.flops for run in main] == sorted(run.flops for run in main)


def test_names_never_collide(tmp_path: Path) -> None:
    study = read(tmp_path, "tokens=[8192,9216,1000000,1001472,2000000]")
    names = [run.name for run in runs.main_runs(study, derived()[1], tmp_path, {})]
    assert len(set(names)) == len(names) == 5 * 8
    assert "a-4e-t1M-s1" in names and "a-4e-t1.001472M-s1" in names


def test_two_budgets_of_one_number_of_steps_are_refused(tmp_path: Path) -> None:
    """They would be one training under two names, and a report would take it for two seeds."""
    study = read(tmp_path, "tokens=[1000000,1000448]")
    with pytest.raises(ValueError, match=r"a-dense-t1M-s0 and a-dense-t1\.000448M-s0 both train on 1,000,448 tokens"):
        runs.main_runs(study, derived()[1], tmp_path, {})


@pytest.mark.parametrize("folder", ["my study (v=2), é", "it's", "a {b} [c]"])
def test_a_run_goes_into_its_folder_whatever_the_name(tmp_path: Path, folder: str) -> None:
    from moe.compose import compose

    run = runs.main_runs(*derived(), tmp_path / folder, {})[0]
    assert compose(run.overrides).run_dir == str(tmp_path / folder / "runs" / run.name)


def test_what_the_overrides_mean_is_what_config_says(tmp_path: Path) -> None:
    from moe.compose import compose, differences

    run = runs.sweep_runs(*derived("frontier", SWEEP), tmp_path)[5]
    assert differences(compose(run.overrides), run.config) == []


def test_dense_models_should_surround_sparse_ones() -> None:
    notes = unbracketed(derived()[1])
    assert notes == [
        "a-4e: 1 dense sizes below and 1 above it",
        "a-16e: 1 dense sizes below and 1 above it",
        "b-16e: 2 dense sizes below and 0 above it",
    ]


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_of_the_tree_composes(name: str, tmp_path: Path) -> None:
    study = files.read_study(name, [f"data_folder={tmp_path}"])
    assert study.name == name
    design = derive(study)
    _, unknown = runs.core_minutes(study, runs.main_runs(study, design, tmp_path, sweep.first_choices(study, design)))
    assert unknown == []
