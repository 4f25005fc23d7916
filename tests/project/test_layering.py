"""Imports point down. The order is the architecture; function-level imports count too."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# top to bottom; packages on one line never import each other
LAYERS = [
    ["train", "moe.cli"],
    ["moe.scaling.study", "moe.multirun"],
    ["moe.run", "moe.launch"],
    ["moe.run_folder"],
    ["moe.dry_run", "moe.instruct", "moe.pretraining"],
    [
        *("moe.training", "moe.evaluation", "moe.interop"),
        *("moe.samples", "moe.summary", "moe.overview", "moe.kernel_table"),
    ],
    ["moe.generation", "moe.upcycling"],
    ["moe.checkpoint"],
    ["moe.distributed"],
    ["moe.model"],
    ["moe.layers", "moe.data"],
    ["moe.scaling", "moe.compose"],
    ["moe.config", "moe.kernels", "moe.console"],
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# a closed-form count knows no torch, so that a laptop can plan; a configuration knows nothing at all
WITHOUT_TORCH = [
    "moe/compose.py",
    *(str(p.relative_to(ROOT)) for p in (ROOT / "moe/config").glob("*.py")),
    *(str(p.relative_to(ROOT)) for p in (ROOT / "moe/scaling").rglob("*.py")),
]


def sources() -> list[Path]:
    """Every Python file, `kernels/` included: rglob does not follow the symlink."""
    files = [ROOT / "train.py"]
    files += sorted((ROOT / "moe").rglob("*.py")) + sorted((ROOT / "kernels").rglob("*.py"))
    return files


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("moe", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


def owner(module: str) -> str | None:
    """The entry of LAYERS that a module belongs to."""
    fitting = [name for name in RANK if module == name or module.startswith(name + ".")]
    return max(fitting, key=len) if fitting else None


def imports(path: Path) -> list[str]:
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found += [stem, *(f"{stem}.{alias.name}" for alias in node.names)]
    return found


def violations(path: Path) -> list[str]:
    here = owner(module_name(path))
    if here is None:
        return []  # moe/__init__.py
    bad = []
    for target in imports(path):
        there = owner(target)
        if there is not None and there != here and RANK[there] <= RANK[here]:
            bad.append(f"{module_name(path)} imports {target}")
        if here == "moe.kernels" and target.split(".")[0] == "moe" and there != "moe.kernels":
            bad.append(f"{module_name(path)} imports {target}: kernels know nothing of moe")
    return bad


def test_every_file_is_walked() -> None:
    names = {module_name(path) for path in sources()}
    assert {"train", "moe.kernels.permute.op", "moe.layers.moe", "moe.run"} <= names


def test_every_module_has_a_place() -> None:
    assert [name for path in sources() if owner(name := module_name(path)) is None] == ["moe"]


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_point_down(path: Path) -> None:
    assert violations(path) == []


def test_kernels_say_nothing_absolute() -> None:
    """Inside kernels/ imports are relative, so that the folder works under any name."""
    for path in (ROOT / "kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] not in ("kernels", "moe"), path


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_planning_needs_no_torch(name: str) -> None:
    assert not [target for target in imports(ROOT / name) if target.split(".")[0] == "torch"]


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("moe/layers/bad.py", "from moe.data.loader import TokenBatch", 2),
        ("moe/training/bad.py", "def f():\n    import moe.evaluation.perplexity", 1),
        ("moe/data/bad.py", "from ..run import train", 2),
        ("kernels/permute/bad.py", "from moe.config import RunConfig", 3),
        ("moe/model_bad.py", "", 0),
    ],
)
def test_the_walk_finds_violations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, source: str, expected: int
) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(source)
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    assert bool(violations(path)) == bool(expected)


def test_package_files_are_empty_where_they_must_be() -> None:
    for name in ("moe/scaling/__init__.py", "moe/data/__init__.py"):
        assert (ROOT / name).read_text() == ""
    assert imports(ROOT / "moe/__init__.py") == []  # it states the version
    for name in ("kernels", "configs"):
        assert not (ROOT / name / "__init__.py").exists()
