from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from moe.cli import app, main
from moe.compose import compose
from moe.config import RunConfig
from moe.config.cluster import PlanConfig
from moe.config.fields import field_names
from moe.run import train


@pytest.fixture(scope="module")
def finished(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(compose([*overrides, f"run_dir={tmp_path_factory.mktemp('cli') / 'run'}", "train.num_steps=2"]))


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_generate_streams_one_prompt_and_repeats(finished: Path) -> None:
    arguments = ("generate", finished, "--prompt", "the expert", "--tokens", 8)
    assert invoke(*arguments).startswith("the expert")
    assert invoke(*arguments) == invoke(*arguments)
    assert invoke(*arguments, "--seed", 1) != invoke(*arguments)


def test_generate_reads_a_batch_of_prompts_from_a_file(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the token\na router\nwords\n")
    output = invoke("generate", finished, "--prompts-file", tmp_path / "prompts.txt", "--tokens", 4, "--temperature", 0)
    parts = output.split("-" * 20 + "\n")
    assert [
        part.startswith(prompt) for part, prompt in zip(parts, ["the token", "a router", "words"], strict=False)
    ] == [True] * 3
    alone = invoke("generate", finished, "--prompt", "a router", "--tokens", 4, "--temperature", 0)
    assert parts[1] == alone


def test_generate_refuses_a_file_without_prompts(tmp_path: Path) -> None:
    """Instead of continuing an empty prompt that nobody asked for; a byte-order mark is no part of a prompt."""
    file = tmp_path / "prompts.txt"
    file.write_text("")
    with pytest.raises(ValueError, match=r"prompts\.txt holds no prompt: put one on each line"):
        invoke("generate", tmp_path / "no run", "--prompts-file", file)
    file.write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"prompts\.txt is not UTF-8: .*; convert the file first"):
        invoke("generate", tmp_path / "no run", "--prompts-file", file)


def test_generate_reads_a_file_with_a_byte_order_mark(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("the token", encoding="utf-8-sig")
    arguments = ("--tokens", 4, "--temperature", 0)
    read = invoke("generate", finished, "--prompts-file", tmp_path / "prompts.txt", *arguments)
    assert read == invoke("generate", finished, "--prompt", "the token", *arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-p", 0], r"top_p \(0\.0\)"),
        (["--seed", 1 << 60], r"seed \(1152921504606846976\)"),
        (["--length-penalty", 3], r"--length-penalty applies to beam search: set --beams above 1, or leave it out"),
        (["--beams", 2, "--seed", 1], r"--seed applies to sampling, not to beam search \(--beams 2\): leave it out"),
        (["--beams", 2, "--temperature", 0, "--top-p", 0.5], r"--temperature, --top-p applies to sampling"),
    ],
)
def test_options_without_meaning_are_refused_before_the_model_is_read(
    tmp_path: Path, options: list[object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        invoke("generate", tmp_path / "no run", *options)


def test_generate_runs_where_it_is_told(finished: Path) -> None:
    arguments = ("generate", finished, "--prompt", "the expert", "--tokens", 4, "--temperature", 0)
    assert invoke(*arguments, "--device", "cpu").startswith("the expert")
    with pytest.raises(ValueError, match=r"device \('foo'\) must be one of: auto, cpu, cuda"):
        invoke(*arguments, "--device", "foo")


def test_prepare_prints_where_the_shards_are(overrides: list[str]) -> None:
    path = Path(invoke("prepare", *overrides).strip().splitlines()[-1])
    assert (path / "train" / "tokens.bin").is_file()


def test_train_takes_overrides_and_multirun(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = invoke("train", "-m", *overrides, "train.num_steps=1", "eval.every=null", "seed=0,1")
    assert "run 1 of 2: tiny-8e-s0" in output and "run 2 of 2: tiny-8e-s1" in output
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert [name.rsplit("-", 1)[0] for name in names if "sweep" not in name] == ["tiny-8e-s0", "tiny-8e-s1"]
    (table,) = (tmp_path / "runs").glob("sweep-*.csv")
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["steps"], row["outcome"]) for row in rows] == [
        ("0", "1", "complete"),
        ("1", "1", "complete"),
    ]
    for row in rows:
        results = json.loads((tmp_path / row["run_dir"] / "results.json").read_text())
        (figures,) = results["splits"]["validation"]["domains"].values()
        assert float(row["validation_loss"]) == pytest.approx(figures["cross_entropy"])
        assert float(row["bits_per_byte"]) == pytest.approx(figures["bits_per_byte"])
        assert f"{figures['cross_entropy']:.4f}" in output.split("outcome")[1]
    assert str(table.relative_to(tmp_path)) in output


def test_help_names_every_command() -> None:
    output = invoke("--help")
    for name in ("train", "prepare", "generate", "convert", "kernels", "launch"):
        assert name in output


def test_kernels_are_listed_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The table, its file, and the error that a kernel which spills must be; compiling is tested in test_aot."""
    from moe.kernels import aot

    good = aot.KernelCost("permute", "gather_kernel", "float32", "sm_90", num_warps=4, num_stages=3, registers=40)
    monkeypatch.setattr(aot, "compile_all", lambda **_: [good])
    output = invoke("kernels", "--out", tmp_path / "costs.csv")
    assert "gather_kernel" in output
    assert (tmp_path / "costs.csv").read_text().splitlines() == [
        "op,kernel,configuration,target,num_warps,num_stages,registers,spill_instructions,stack_bytes,shared_bytes,"
        "programs_per_processor,tensor_instructions,wgmma_instructions,async_copies,tma_copies",
        "permute,gather_kernel,float32,sm_90,4,3,40,0,0,0,0,0,0,0,0",
    ]
    bad = [replace(good, spill_instructions=3), replace(good, kernel="sum_kernel", error="PTXASError: no")]
    monkeypatch.setattr(aot, "compile_all", lambda **_: [good, *bad])
    result = CliRunner().invoke(app, ["kernels"])
    assert result.exit_code == 1  # not a mistake of the user
    assert "2 of 3 kernels do not compile or spill: gather_kernel (float32, sm_90)" in result.stderr


def test_the_version_is_the_installed_one() -> None:
    assert invoke("--version").strip() == version("moe-lm")


@pytest.mark.parametrize("name", ["train", "prepare", "launch", "plan"])
def test_help_lists_the_keys_with_their_meanings(name: str) -> None:
    """As `python train.py --help` does; a plan has keys of its own, and a cluster that must be chosen."""
    schema = PlanConfig if name == "plan" else RunConfig
    text = invoke(name, "--help")
    keys = text.split("keys with their defaults")[1].splitlines()[1:]
    assert {line.split()[0].split("=")[0] for line in keys} == set(field_names(schema))
    of_run = [line for line in keys if line.split()[0].split("=")[0] in field_names(RunConfig)]
    assert not [line for line in of_run if "  # " not in line and not re.match(r"  [\w.]*\bname\b", line)]
    assert "  +moe=  " in text and "train.num_steps=" in text
    if name == "plan":
        assert "a100_80gb" in text and "  cluster.memory_gib  " in text and "plan.ep_size=null" in text


def test_the_package_states_its_version_and_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import moe; print(moe.__version__, *(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [version("moe-lm"), "moe"]


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


def test_every_command_and_option_says_what_it_is() -> None:
    """In a sentence; a flag has no opposite that is what happens anyway."""
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) >= 17
    for path, command in found.items():
        assert command.help, path
        for parameter in command.params:
            text = getattr(parameter, "help", None)
            if parameter.name in ("help", "install_completion", "show_completion"):
                continue
            assert text and text.endswith("."), (path, text)
            if getattr(parameter, "is_flag", False):
                assert not parameter.secondary_opts, (path, parameter.secondary_opts)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "+typo=1"], "there is no key 'typo'"),
        (["train", "--gpus=1"], "unknown option --gpus=1"),
        (["generate", "nowhere"], "nowhere"),
        (["generate", "nowhere", "--prompts-file", "none.txt"], "none.txt: No such file or directory"),
        (["perplexity", "nowhere", "none.txt"], "none.txt"),
        (["experts", "nowhere"], "nowhere"),
        (["eval", "nowhere", "--protocol", "xglm", "--tasks", "copa", "--data-dir", "."], "nowhere"),  # no extra needed
        (["translate", "nowhere", "none", "--languages", "en,de"], "none"),
        (["convert", "nowhere", "new"], "nowhere"),
        (["convert", "from-hf", "nowhere", "new"], "nowhere"),
        (["convert", "to-hf", "nowhere", "new"], "nowhere"),
        (["plan"], "cluster is not chosen"),
        (["launch"], "add --slurm"),
        (["scale", "run", "nowhere"], "nowhere"),
        (["instruct", "build", "nowhere", "data", "out"], "nowhere"),
        (["instruct", "check", "nowhere"], "nowhere"),
        (["instruct", "show", "nowhere"], "nowhere"),
        (["instruct", "report", "new", "nowhere"], "nowhere"),
        (["kernels", "--target", "sm_1"], "sm_1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["moe", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and errors[0].startswith("error: ") and message in errors[0], errors
    assert not list(tmp_path.iterdir())
