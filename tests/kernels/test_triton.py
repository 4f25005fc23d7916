"""The Triton kernels in Triton's interpreter, in a session of its own: triton_*.py beside this file.

TRITON_INTERPRET is read where kernels are decorated, so it must be set before the first of them is imported and would
leak into every other test here. To work on one op: TRITON_INTERPRET=1 pytest tests/kernels/triton_<op>.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import pytest
import torch

from moe.kernels.backend import choose_backend
from moe.kernels.expert_ffn import expert_ffn
from moe.kernels.grouped_gemm import grouped_gemm

pytest.importorskip("triton", reason="Triton has packages for Linux only")

HERE = Path(__file__).parent
FILES = sorted(path.stem for path in HERE.glob("triton_*.py"))
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Counter[str], str]:
    """Tests that passed by file, and what pytest printed."""
    report = tmp_path_factory.mktemp("interpreted") / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}"]
    result = subprocess.run(
        [*command, *(str(HERE / f"{name}.py") for name in FILES)],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    output = result.stdout + result.stderr
    assert report.exists(), output
    passed: Counter[str] = Counter()
    for case in ET.parse(report).iter("testcase"):
        if len([child for child in case if child.tag in ("failure", "error", "skipped")]) == 0:
            passed[case.attrib["classname"].split(".")[-1]] += 1
        else:
            passed[case.attrib["classname"].split(".")[-1]] -= 10**6
    return passed, output


def test_there_is_a_file_for_every_op_with_kernels() -> None:
    ops = sorted(path.parent.name for path in (ROOT / "kernels").glob("*/triton_impl.py"))
    assert [f"triton_{op}" for op in ops] == FILES


@pytest.mark.parametrize("name", FILES)
def test_in_the_interpreter(name: str, interpreted: tuple[Counter[str], str]) -> None:
    passed, output = interpreted
    assert passed[name] > 0, output[-8000:]


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(5, 4), torch.randn(2, 3, 4), torch.tensor([0, 2, 5])


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="then a CPU is allowed")
def test_a_request_that_a_cpu_cannot_meet_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"backend \('triton'\) of grouped_gemm needs tensors on a GPU.*TRITON_INTERP"):
        grouped_gemm(*problem(), backend="triton")
    with pytest.raises(ValueError, match="of expert_ffn needs tensors on a GPU"):
        rows, weight, offsets = problem()
        w_out = weight.transpose(1, 2)
        expert_ffn(rows, offsets, weight, None, w_out, None, None, activation="gelu", backend="triton")


def test_auto_is_triton_on_a_gpu_and_torch_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_backend("op", "auto", "cuda", has_triton=True) == "triton"
    assert choose_backend("op", "auto", "cpu", has_triton=True) == "torch"
    assert choose_backend("op", "auto", "cuda") == "torch"
    assert choose_backend("op", "triton", "cuda", has_triton=True) == "triton"
    with pytest.raises(ValueError, match="this op has no Triton kernels"):
        choose_backend("op", "triton", "cuda")
    monkeypatch.setattr("moe.kernels.backend._TRITON_INSTALLED", False)
    assert choose_backend("op", "auto", "cuda", has_triton=True) == "torch"
    with pytest.raises(ValueError, match="needs the triton package"):
        choose_backend("op", "triton", "cuda", has_triton=True)


def test_the_interpreter_is_never_chosen_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_backend("op", "auto", "cpu", has_triton=True) == "torch"
    assert choose_backend("op", "triton", "cpu", has_triton=True) == "triton"
