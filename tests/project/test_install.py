"""The two symlinks in an editable install, a wheel and an sdist, inside and outside the checkout, and beside Hugging
Face's `kernels` package, whose import name our folder must never take."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = (
    "import moe.layers, moe.kernels.permute, moe.compose, pathlib, sys\n"
    "config = moe.compose.compose(['+moe=512e'])\n"
    "assert config.model.moe.num_experts == 512\n"
    "print(pathlib.Path(moe.__file__).resolve())"
)
THEIRS = "def get_kernel():\n    return 'theirs'\n"


def run(*arguments: object, cwd: Path, path: Path | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    result = subprocess.run(
        [str(argument) for argument in arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*arguments: object, cwd: Path) -> None:
    run(sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-build-isolation", "--quiet", cwd=cwd)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the working tree, symlinks kept: an installation must not lean on the original."""
    copy = tmp_path_factory.mktemp("checkout") / "moe-lm"
    copy.mkdir()
    for name in ("moe", "kernels", "configs"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "train.py", "constraints.txt"):
        shutil.copy(ROOT / name, copy / name)
    assert (copy / "moe" / "kernels").is_symlink()
    return copy


@pytest.fixture(scope="module")
def sdist(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "setup.py", "-q", "sdist", "--dist-dir", out, cwd=checkout)
    (archive,) = out.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = checkout if request.param == "checkout" else request.getfixturevalue("sdist")
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", source, "--wheel-dir", out, cwd=out)
    (archive,) = out.glob("moe_lm-*.whl")
    return archive


def test_the_wheel_holds_both_folders_inside_moe(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.startswith("moe_lm-")} == {"moe"}
    for folder, pattern in (("kernels", "*.py"), ("configs", "*.yaml")):
        expected = {f"moe/{path.relative_to(ROOT)}" for path in (ROOT / folder).rglob(pattern)}
        assert expected <= set(names)
    assert "moe/py.typed" in names  # without it a user's type checker takes everything for Any


def test_the_wheel_works_outside_the_checkout_and_beside_another_kernels(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "kernels").mkdir(parents=True)
    (site / "kernels" / "__init__.py").write_text(THEIRS)
    pip("install", wheel, "--target", site, cwd=tmp_path)
    assert (site / "kernels" / "__init__.py").read_text() == THEIRS
    code = f"{CHECK}\nimport kernels; assert kernels.get_kernel() == 'theirs'"
    assert Path(run(sys.executable, "-c", code, cwd=tmp_path, path=site).strip()).is_relative_to(site)


def test_the_sdist_holds_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "moe/kernels/permute/op.py"} <= names


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with an editable install, our dependencies and another `kernels` package."""
    environment = tmp_path_factory.mktemp("editable") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(THEIRS)
    run(
        *(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-build-isolation", "--quiet"),
        *("--editable", checkout),
        cwd=environment,
    )
    return python


@pytest.mark.parametrize("inside", [True, False])
def test_the_editable_install_works_inside_and_outside_the_checkout(
    editable: Path, checkout: Path, tmp_path: Path, inside: bool
) -> None:
    where = checkout if inside else tmp_path
    assert Path(run(editable, "-c", CHECK, cwd=where).strip()).is_relative_to(checkout.resolve())
    if not inside:  # inside, Python puts the current folder first for `-c`
        run(editable, "-c", f"{CHECK}\nimport kernels; assert kernels.get_kernel() == 'theirs'", cwd=where)
    assert "Mixture-of-Experts" in run(editable.parent / "moe", "--help", cwd=where)


def test_a_checkout_without_symlinks_is_refused_with_the_way_out(checkout: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkout, broken, symlinks=True, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    for name in ("kernels", "configs"):
        (broken / "moe" / name).unlink()
        (broken / "moe" / name).write_text(f"../{name}")  # what git writes without core.symlinks
    result = subprocess.run([sys.executable, "setup.py", "--version"], cwd=broken, capture_output=True, text=True)
    assert result.returncode != 0
    assert "core.symlinks true" in result.stderr
    result = subprocess.run([sys.executable, "train.py"], cwd=broken, capture_output=True, text=True)
    assert result.returncode == 2
    assert "is a text file, not a symbolic link" in result.stderr
    assert "Traceback" not in result.stderr
