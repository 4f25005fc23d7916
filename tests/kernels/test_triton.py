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


def test_the_portable_path_of_a_grouped_product() -> None:
    """Against one product per row, output and both gradients, an empty expert among them."""
    rows, weight = torch.randn(5, 4, dtype=torch.float64), torch.randn(3, 3, 4, dtype=torch.float64)
    offsets, experts = torch.tensor([0, 2, 2, 5]), torch.tensor([0, 0, 2, 2, 2])
    results = []
    for backend in ("torch", "reference", None):
        leaves = [rows.clone().requires_grad_(), weight.clone().requires_grad_()]
        if backend is None:
            y = torch.einsum("rk,rnk->rn", leaves[0], leaves[1][experts])
        else:
            y = grouped_gemm(*leaves, offsets, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.pow(2).sum(), leaves)])
    for backend_results in results[:2]:
        for actual, expected in zip(backend_results, results[2], strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda r, w: grouped_gemm(r, w, offsets), [leaf.detach().requires_grad_() for leaf in leaves]
    )


def test_a_compiler_sees_one_op() -> None:
    rows, weight, offsets = problem()
    weight.requires_grad_()
    compiled = torch.compile(lambda r, w: grouped_gemm(r, w, offsets), fullgraph=True, backend="aot_eager")
    y = compiled(rows, weight)
    torch.testing.assert_close(y, grouped_gemm(rows, weight, offsets))
    y.sum().backward()
    assert weight.grad is not None and weight.grad.abs().sum() > 0


def test_bad_input_is_refused() -> None:
    rows, weight, offsets = problem()
    with pytest.raises(ValueError, match=r"rows \(5, 3\) must be \(R, K\) and weight \(2, 3, 4\)"):
        grouped_gemm(rows[:, :3], weight, offsets)
    with pytest.raises(ValueError, match=r"expert_offsets \(2,\) must be \(E\+1,\)"):
        grouped_gemm(rows, weight, offsets[:2])
    with pytest.raises(ValueError, match=r"from 0 to the number of rows \(5\), not from 0 to 4"):
        grouped_gemm(rows, weight, torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=r"rows \(torch.float64\) and weight \(torch.float32\) must have one dtype"):
        grouped_gemm(rows.double(), weight, offsets)
