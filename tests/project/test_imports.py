"""Importing does nothing: no GPU, no heavy package, no message, no configuration of torch."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = [
    "triton",
    "hydra",
    "omegaconf",
    "transformers",
    "tensorboard",
    "sentencepiece",
    "matplotlib",
    "pyarrow",
    "megablocks",
]
# what README's test command does not install: the extras' packages, and what they bring
OPTIONAL = ["transformers", "tokenizers", "accelerate", "lm_eval", "datasets", "sacrebleu", "rouge_score"]
OPTIONAL += ["fairscale", "pdoc", "click", "nltk", "pandas", "sklearn", "requests", "regex"]
COLLECT = """
import sys, pytest
sys.modules.update(dict.fromkeys(sys.argv[1:]))  # None: as if it were not installed
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "tests"]))
"""
MAXIMUM_SECONDS = 1.5  # of `import moe.layers` beyond `import torch`


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stderr == ""
    return result.stdout


def test_layers_load_nothing_heavy_and_touch_nothing() -> None:
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "state = (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())\n"
        "import moe.layers\n"
        "assert state == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())\n"
        "assert not torch.cuda.is_initialized()\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))"
    )
    loaded = set(json.loads(python(code)))
    assert not loaded & set(HEAVY)


def test_layers_import_quickly() -> None:
    code = "import time, torch; t = time.perf_counter(); import moe.layers; print(time.perf_counter() - t)"
    assert statistics.median(float(python(code)) for _ in range(3)) < MAXIMUM_SECONDS


@pytest.mark.parametrize("module", ["moe.config", "moe.scaling.params", "moe.scaling.flops", "moe.compose", "moe.cli"])
def test_planning_loads_no_torch(module: str) -> None:
    assert python(f"import sys, {module}; print('torch' in sys.modules)").strip() == "False"


def test_every_module_imports_alone() -> None:
    names = []
    for base, prefix in ((ROOT / "moe", "moe"), (ROOT / "kernels", "moe.kernels")):
        for path in sorted(base.rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            names.append(".".join([prefix, *parts]).removesuffix(".__init__"))
    assert len(names) > 40
    # one process: what matters is that none prints, and that none fails but for an extra that is not installed
    code = f"""
import importlib
for name in {names!r}:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name not in {OPTIONAL!r}:
            raise
"""
    assert python(code) == ""


def test_every_public_name_has_a_docstring() -> None:
    code = (
        "import inspect, moe.layers\n"
        "print([n for n in moe.layers.__all__ if not inspect.getdoc(getattr(moe.layers, n))])"
    )
    assert python(code).strip() == "[]"


def test_all_tests_are_collected_without_the_optional_packages() -> None:
    """One import at the top of a module ends the whole command where an extra is not installed."""
    done = subprocess.run([sys.executable, "-c", COLLECT, *OPTIONAL], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
