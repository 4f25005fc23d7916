"""Overrides become a checked configuration, or one clear error."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from moe import compose as compose_module
from moe.compose import (
    CONFIGS,
    NOT_IDENTITY,
    compose,
    config_hash,
    differences,
    expand_multirun,
    from_yaml,
    identity,
    overrides_for,
    to_yaml,
    usage,
)
from moe.config import DataConfig, EvalConfig, MoEConfig, OptimConfig, RopeScalingConfig, RunConfig
from moe.config.cluster import PlanConfig
from moe.config.fields import as_override, field_names


def test_the_default_is_the_dense_tiny_model_and_moe_adds_experts() -> None:
    dense, sparse = compose([]), compose(["+moe=512e"])
    assert dense.model.moe is None
    assert (dense.model.name, dense.data.name) == ("tiny", "python")
    assert sparse.model.moe.num_experts == 512
    sparse.model.moe = None
    assert sparse == dense  # nothing else differs between twins


EXPERIMENTS = sorted((CONFIGS / "experiment").rglob("*.yaml"))


@pytest.mark.parametrize("preset", EXPERIMENTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_experiment_composes(preset: Path) -> None:
    name = str(preset.relative_to(CONFIGS / "experiment"))[: -len(".yaml")]
    config = compose([f"experiment={name}"])
    if preset.parent.name != "artetxe2021":
        return
    # 300e9 tokens (Artetxe et al. 2021): updates times batch
    assert config.train.num_steps * config.train.batch_tokens == pytest.approx(300e9, rel=1e-5)
    assert (config.optim.beta2, config.optim.clip_norm, config.optim.decay) == (0.98, None, "all")
    if config.model.moe is not None:
        assert (config.model.moe.router, config.model.moe.load_balance_reduction) == ("gshard", "sum")


def test_recipes_of_the_paper() -> None:
    """Three rows of Artetxe et al. 2021, deviations included."""
    rows = {name: compose([f"experiment=artetxe2021/{name}"]) for name in ("355m", "207b", "1.1t")}
    assert (rows["355m"].model.dropout, rows["355m"].optim.warmup_steps) == (0.0, 715)
    assert (rows["207b"].optim.lr, rows["207b"].optim.weight_decay, rows["207b"].optim.warmup_steps) == (
        1.6e-4,
        0.0,
        2000,
    )
    assert (rows["1.1t"].model.name, rows["1.1t"].optim.lr, rows["1.1t"].train.batch_tokens) == ("6.7b", 1.2e-4, 2**21)


FIELDS = {"moe": MoEConfig, "data": DataConfig, "optim": OptimConfig, "eval": EvalConfig}


@pytest.mark.parametrize("group", FIELDS)
def test_every_preset_states_every_field(group: str) -> None:
    """So that nothing stale stays when one preset replaces another."""
    names = {field.name for field in dataclasses.fields(FIELDS[group])}
    files = list((CONFIGS / group).glob("*.yaml"))
    assert files
    for path in files:
        assert set(yaml.safe_load(path.read_text())) == names, path.name


def test_experts_replace_those_of_a_preset_whole() -> None:
    config = compose(["model=olmoe_1b_7b", "+moe=8e", "train.batch_tokens=8192"])
    assert config.model.moe == compose(["+moe=8e"]).model.moe


def test_yaml_holds_values_alone() -> None:
    for path in CONFIGS.rglob("*.yaml"):
        text = path.read_text()
        assert "_target_" not in text and "${" not in text, path


def test_one_path_or_a_list_of_paths() -> None:
    for given, expected in (
        ("data.path=a.txt", ["a.txt"]),
        ("data.path='my texts/*.jsonl'", ["my texts/*.jsonl"]),
        ("data.path=[a.txt,b]", ["a.txt", "b"]),
        ("data.path='Bücher/größte.txt'", ["Bücher/größte.txt"]),
        (r"data.path='a\b.txt'", [r"a\b.txt"]),
    ):
        assert compose(["data=text", given]).data.path == expected


def test_yaml_comes_back() -> None:
    config = compose(["+moe=64e", "seed=3", "data=text", "data.path=[a,b]"])
    assert from_yaml(to_yaml(config)) == config


def test_overrides_say_what_presets_do_not() -> None:
    given = ["model=125m", "data=text", "data.path=[a b.txt,c]", "+data.sources.sw=[d]", "model.dropout=0.25"]
    scaling = ["model.position=rope", "model.rope_scaling={kind: linear, factor: 2.0}", "model.bias=false"]
    config = compose([*given, *scaling, "+moe=8e", "model.moe.top_k=1", "train.batch_tokens=2048", "seed=3"])
    written = overrides_for(config, ("model", "data", "train.batch_tokens"), "+moe=8e")
    assert written[:3] == ["model=125m", "data=text", "+moe=8e"]
    assert compose([*written, "seed=3"]) == config
    assert overrides_for(compose(["seed=3"]), ("model", "data")) == []


@pytest.mark.parametrize(
    "text", ["a b", "é/x", "it's", 'say "x"', r"a\b", r"a\"b\\", "{a}, [b]", "two\nlines", "true", "-", ".5e3"]
)
def test_a_text_comes_back_from_its_override(text: str) -> None:
    """Hydra knows no escapes but of quotes, and letters beyond ASCII in quotes alone."""
    assert compose([f"run_dir={as_override(text)}"]).run_dir == text
    assert compose(["data=text", f"data.path={as_override([text, 'b'])}"]).data.path == [text, "b"]


def test_old_or_foreign_yaml_is_refused() -> None:
    text = to_yaml(compose([]))
    with pytest.raises(ValueError, match="no run configuration of this version: Key 'colour'"):
        from_yaml(text + "colour: red\n")
    with pytest.raises(ValueError, match="no run configuration"):
        from_yaml(text.replace("d_model: 128", "d_model: wide"))


def test_identity_leaves_out_where_and_how() -> None:
    config = compose([])
    moved = compose(["run_dir=x", "device=cpu", "data.cache_dir=y", "data.num_workers=1", "train.checkpoint_every=3"])
    assert differences(config, moved) == []
    assert config_hash(config) == config_hash(moved)
    changed = ["train.recompute=true", "train.compile=true", "train.max_skipped_steps=3", "train.histogram_every=7"]
    samples = ["eval.prompts=[a]", "eval.sample_tokens=3", "eval.temperature=0", "eval.top_p=0.5"]
    assert differences(config, compose([*changed, *samples])) == []
    other = compose(["+moe=8e", "optim.lr=0.5"])
    assert any(difference.startswith("optim.lr: ") for difference in differences(config, other))
    assert any(difference.startswith("model.moe") for difference in differences(config, other))
    assert config_hash(config) != config_hash(other)
    assert not identity(config).keys() & set(NOT_IDENTITY)


def test_multirun_is_the_product_in_order() -> None:
    assert expand_multirun(["+moe=8e", "seed=1"]) == [["+moe=8e", "seed=1"]]
    assert expand_multirun(["-m", "+moe=8e,32e", "seed=0,1", "optim.lr=0.1"]) == [
        ["+moe=8e", "seed=0", "optim.lr=0.1"],
        ["+moe=8e", "seed=1", "optim.lr=0.1"],
        ["+moe=32e", "seed=0", "optim.lr=0.1"],
        ["+moe=32e", "seed=1", "optim.lr=0.1"],
    ]
    for overrides in expand_multirun(["-m", "+moe=8e,32e", "model=tiny"]):
        compose(overrides)


def test_values_that_are_not_named_are_refused() -> None:
    for given in ("+moe=glob(*)", "optim.lr=interval(0,1)"):
        with pytest.raises(ValueError, match="does not say which values there are: name them, as ") as caught:
            expand_multirun(["-m", given])
        assert "\n" not in str(caught.value)


def test_different_runs_share_no_folder(tmp_path: Path) -> None:
    folder = f"run_dir={tmp_path}"
    with pytest.raises(ValueError, match=r"is the folder of several runs of -m, which differ in seed: 0 != 1: leave"):
        expand_multirun(["-m", folder, "seed=0,1"])
    with pytest.raises(ValueError, match=r"differ in seed: 0 != 1"):
        expand_multirun(["-m", f"run_dir={tmp_path},{tmp_path}/", "seed=0,1"])
    assert len(expand_multirun(["-m", f"run_dir={tmp_path},{tmp_path}b", "optim.lr=0.1"])) == 2
    assert len(expand_multirun(["-m", folder, "seed=0,0"])) == 2  # the second finds the first complete
    assert expand_multirun([folder, "seed=0"]) == [[folder, "seed=0"]]


def test_lists_are_no_sweeps() -> None:
    assert expand_multirun(["-m", "data.path=[a,b]"]) == [["data.path=[a,b]"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+typo=1"], "there is no key 'typo'"),
        (["model.d_modell=64"], r"there is no key 'model\.d_modell'; did you mean model\.d_model"),
        (["+model.colour=red"], r"there is no key 'model\.colour'"),
        (["model=huge"], r"model preset 'huge' does not exist; there are: .*\btiny\b"),
        (["+moe=513e"], r"moe preset '513e' does not exist; did you mean 512e\? There are: .*\b512e\b"),
        (["experiment=nope"], r"experiment preset 'nope' does not exist; there are: .*artetxe2021/1\.1t"),
        (["moe=512e"], r"write \+moe= with the plus"),
        (["experiment=artetxe2021/15b", "+moe=8e"], "write moe= without the plus"),
        (["+moe=8e", "+moe=16e"], r"\+moe= is given more than once: .* keep one"),
        (
            ["model.moe.top_k=1"],
            r"model\.moe is null, so model\.moe\.top_k=1 .*add \+moe=PRESET, for instance \+moe=8e",
        ),
        (["+model.moe.num_experts=8"], r"model\.moe is null, .*for instance \+moe=8e"),
        (["++model.moe.num_experts=8"], r"model\.moe is null, .*for instance \+moe=8e"),
        (["~model.moe.top_k"], r"model\.moe is null, .*for instance \+moe=8e"),
        (["model.moe=null", "model.moe.top_k=1"], r"model\.moe=null leaves no model\.moe .*: leave one of them out"),
        (["model.moe.top_k=1", "model.d_modell=64"], r"there is no key 'model\.d_modell'"),
        (["tune.dropout=0.1"], r"tune is null, .*add tune=PRESET; there are: instructions, .*single_task"),
        (["tune.task.name=copa"], r"tune is null, .*add tune=PRESET"),
        (
            ["tune=instructions", "tune.task.name=copa"],
            r"tune\.task is null, .*give it whole, 'tune\.task=\{name: copa\}'",
        ),
        (
            ["model.rope_scaling.factor=2.0"],
            r"rope_scaling is null, .*give it whole, 'model\.rope_scaling=\{kind: KIND, factor: 2\.0\}'",
        ),
        (["model.rope_scaling={factor: 2.0}"], r"model\.rope_scaling\.kind is not set"),
        (["model.rope_scaling={kind: linear, factr: 2.0}"], r"no key 'model\.rope_scaling\.factr'; did you mean model"),
        (["+moe=8e", "model.moe.top_k=9"], r"top_k \(9\) must be at most model\.moe\.num_experts \(8\)"),
        (
            ["+moe=8e", "model.moe.num_experts=8.5"],
            r"num_experts=8\.5: Value '8\.5' .* could not be converted to Integer",
        ),
        (["+moe=8e", "model.moe.num_experts=many"], "could not be converted to Integer"),
        (["model.num_heads=3"], r"model\.d_model \(128\) must be divisible by model\.num_heads \(3\)"),
        (["data=text"], r"data\.path must name at least one file"),
        (["data.path=a.txt"], "applies only with data=text"),
        (["data=text", "data.sources={sw: [a.txt]}"], r"data\.sources takes .*: write \+data\.sources= with the plus"),
        (["data=text", "data.sources.sw=[a.txt]"], r"write \+data\.sources= with the plus"),
        (["data=text", "data.sourcess=[a.txt]"], r"no key 'data\.sourcess'; did you mean data\.sources"),
        (["train.batch_tokens=1000"], r"batch_tokens \(1000\) must be a multiple of the sequence length \(256"),
        (["train.micro_batch_size=3"], r"micro_batch_size \* sequence length \(3 \* 256 = 768\)"),
        (["seed=4294967296"], r"seed \(4294967296\) must be at least 0 and below 2\*\*32"),
        (["seed=0,1"], "start several runs with -m"),
        (["nonsense"], "'nonsense' cannot be read: overrides are written key=value"),
        (["train.num_steps = 5"], "'train.num_steps = 5' cannot be read: .* without spaces around the ="),
        (["hydra.run.dir=elsewhere"], r"hydra\.run\.dir=elsewhere sets Hydra's own .*: run_dir= is where a run writes"),
        (["+hydra/launcher=joblib"], "sets Hydra's own launching, which is not used here"),
        (
            ["experiment=15b"],
            r"preset '15b' does not exist; did you mean artetxe2021/15b\? There are: artetxe2021/1\.1t",
        ),
        (["optim=adam"], r"did you mean adamw\? There are: adamw, artetxe2021, tiny"),
        (["+model=125m"], "model is chosen already: write model= once, without a plus"),
        (["model=null"], "model=null names no preset: leave model= out, or choose one of: 1.3b"),
        (["tune=null"], "tune=null names no preset: leave tune= out"),
        (["parallel=8"], "parallel=8 names no preset"),
        (["num_experts=8"], r"no key 'num_experts'; did you mean model\.moe\.num_experts\?"),
        (["lr=1"], r"no key 'lr'; did you mean optim\.lr\?"),
        (
            ["train.num_steps=1e3"],
            r"^train\.num_steps=1e3: Value '1000\.0' .* could not be converted to Integer; write 1000$",
        ),
        (["train.num_steps=null"], "^train.num_steps=null: it needs a value, and null is none"),
        (["~train.recompute"], "no key can be left out; set it instead"),
        (["eval.prompts=a"], r"eval\.prompts=a: it takes a list, \[A,B\], not one str"),
        (["model.moe=8e"], "model.moe=8e: it is a part with fields of its own"),
        (["optim.lr=-1"], r"optim\.lr \(-1\.0\) must be above 0"),
        (["backend=fast"], r"backend \('fast'\) must be one of: auto, triton, torch, reference"),
        (["data.seq_len=512", "model.position=learned"], r"data\.seq_len \(512\) must be at most model\.max_seq_len"),
        (["model.qk_norm=some"], r"model\.qk_norm \('some'\) must be one of: head, full"),
        (["+moe=8e", "model.moe.router=gshard", "model.moe.top_k=1"], "must be 2 with router=gshard"),
        (["+moe=8e", "model.moe.moe_every=9"], "no layer has experts"),
    ],
)
def test_bad_overrides_are_one_clear_error(overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        compose(overrides)
    assert "\n" not in str(caught.value)


def test_a_part_may_be_given_whole() -> None:
    rope, scaling = "model.position=rope", "model.rope_scaling={kind: linear, factor: 2.0}"
    for given, factor in (([scaling], 2.0), ([scaling, "model.rope_scaling.factor=4.0"], 4.0)):
        assert compose([rope, *given]).model.rope_scaling == RopeScalingConfig("linear", factor)
    changed = compose(["+moe=8e", "model.moe={top_k: 1}"]).model.moe
    assert changed == dataclasses.replace(compose(["+moe=8e"]).model.moe, top_k=1)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown option --gpus; there are -m"):
        expand_multirun(["--gpus", "4"])


def test_a_checkout_without_symlinks_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").write_text("../configs")  # what git writes where it cannot make a link
    monkeypatch.setattr(compose_module, "CONFIGS", tmp_path / "configs")
    with pytest.raises(ValueError, match=r"is a text file, not a symbolic link: .*core\.symlinks true"):
        compose([])


def test_an_incomplete_installation_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compose_module, "CONFIGS", tmp_path)
    with pytest.raises(ValueError, match="the installation is incomplete"):
        compose([])


def test_the_tree_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert compose(["+moe=8e"]).model.moe.num_experts == 8


def test_usage_lists_presets_and_keys() -> None:
    text = usage()
    for expected in (
        "+moe=",
        "512e",
        "artetxe2021/1.1t",
        "train.num_steps=350",
        "model.d_model=128",
        "data.sources={}",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("text", "schema"), [(usage(), RunConfig), (usage("plan", PlanConfig, to_choose=["cluster"]), PlanConfig)]
)
def test_usage_says_what_every_key_means(text: str, schema: type[RunConfig]) -> None:
    keys = text.split("keys with their defaults")[1].splitlines()[1:]
    assert {line.split()[0].split("=")[0] for line in keys} == set(field_names(schema))
    bare = [line for line in keys if "  # " not in line and not re.match(r"  [\w.]*\bname\b", line)]
    assert not bare
    assert "  model.moe.top_k  " in text  # of a part that is null: without a default
