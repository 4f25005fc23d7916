"""Every fenced command of the documentation is tagged, and does what its tag says.

run      is executed here, trainings shortened (marked readme_commands: `pytest -m readme_commands`)
compose  is composed, and its model built on the meta device
self     is for people and for .ci/run: it installs, or runs these tests
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moe.compose import compose, expand_multirun

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TAGS = ("run", "compose", "self")
NOT_COMMANDS = ("python", "yaml", "json", "text")
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

# what shortens a training; a key that a command sets itself is set once more, and the last one holds
SHORT = [
    "train.num_steps=2",
    "train.batch_tokens=1024",
    "model.d_model=32",
    "model.num_heads=2",
    "eval.every=null",
    "eval.sample_tokens=4",
]


def fences() -> list[tuple[str, str, str]]:
    """(page, info string, content) of every fenced block."""
    return [
        (str(page.relative_to(ROOT)), match[1].strip(), match[2])
        for page in PAGES
        for match in FENCE.finditer(page.read_text(encoding="utf-8"))
    ]


def commands(tag: str) -> list[str]:
    """The lines of all blocks with a tag, comments cut off, continued lines joined."""
    blocks = [content for _, info, content in fences() if info == f"bash {tag}"]
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def test_every_command_is_tagged() -> None:
    found = fences()
    assert any(page == "README.md" for page, _, _ in found)
    for page, info, content in found:
        if info.split(" ")[0] in NOT_COMMANDS:
            continue
        assert info in [f"bash {tag}" for tag in TAGS], f"{page}: a block tagged {info!r} starts with {content[:60]!r}"


def test_the_quick_start_is_two_commands() -> None:
    assert commands("self")[:2] == [
        "pip install -c constraints.txt -e . && python train.py +moe=512e",
        "pip install -c constraints.txt -e '.[test]' && pytest",
    ]


def test_python_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a block may write a file
    blocks = [content for page, info, content in fences() if info == "python" and page != "docs/gradient_contract.md"]
    assert blocks
    for block in blocks:
        exec(compile(block, "README", "exec"), {})


@pytest.mark.parametrize("line", commands("compose"))
def test_compose_commands_compose_and_build(line: str) -> None:
    from moe.model import Transformer
    from moe.scaling.params import count_params

    words = shlex.split(line)
    assert words[:2] == ["python", "train.py"] or words[:2] == ["moe", "train"]
    for overrides in expand_multirun(words[2:]):
        config = compose(overrides)
        config.model.vocab_size = config.model.vocab_size or 4096
        model = Transformer(config.model, device="meta")
        assert sum(p.numel() for p in model.parameters()) == count_params(config.model).total


def test_paths_and_links_exist() -> None:
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_nothing_names_a_private_place() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.~])/(home|root|tmp|Users)/", page.read_text(encoding="utf-8")), page


@pytest.mark.readme_commands
def test_run_commands_run(tmp_path: Path) -> None:
    """In order, in one folder, as a reader would who follows the page."""
    lines = commands("run")
    assert lines
    for name in ("README.md", "docs", "moe", "train.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    for line in lines:
        words = shlex.split(line)
        trains = words[:2] in (["python", "train.py"], ["moe", "train"]) or words[0] == "torchrun"
        trains = trains and "--help" not in words and "parallel.dry_run=true" not in words
        if trains:
            words += SHORT
        if words[0] == "python":
            words[0] = sys.executable
        elif words[0] == "torchrun":
            words[:1] = [sys.executable, "-m", "torch.distributed.run"]
        elif words[0] == "moe":
            words[:1] = [sys.executable, "-c", "from moe.cli import main; main()"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(tmp_path / "cache")),
        }
        result = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, f"{line}\n{result.stdout}{result.stderr}"
        if trains:
            assert "bits per byte" in result.stdout, line
