"""Every kernel compiles for every target, without spills, and its products reach the tensor cores. No GPU is needed."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has packages for Linux only")

from moe.kernels.aot import OPS, TARGETS, KernelCost, compile_all
from moe.kernels.expert_ffn import triton_impl
from moe.kernels.expert_ffn.op import ACTIVATIONS
from moe.kernels.launch import recording
from moe.kernels.tiles import HALF_TILES
from moe.kernels.tuning import CANDIDATES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def costs(tmp_path_factory: pytest.TempPathFactory) -> list[KernelCost]:
    """One configuration per kernel and target; `moe kernels` compiles them all."""
    folder = tmp_path_factory.mktemp("aot")
    rows = compile_all(one_each=True, cache_dir=folder, out=folder / "table.json")
    assert [KernelCost(**row) for row in json.loads((folder / "table.json").read_text())] == rows
    again = compile_all(one_each=True, cache_dir=folder, targets=TARGETS[:1], ops=OPS[:1])
    assert again == [row for row in rows if row.target == TARGETS[0] and row.op == OPS[0]]  # seconds too: not compiled
    return rows


def problems(row: KernelCost) -> list[str]:
    """What is wrong with a kernel's cost."""
    if row.error is not None:
        return [row.error]
    found = []
    if row.spill_instructions or row.stack_bytes:
        found.append(f"spills: {row.spill_instructions} instructions, {row.stack_bytes} bytes of stack")
    if row.programs_per_processor < 1:
        found.append("does not fit a processor")
    if row.kernel.endswith(GEMMS) and row.tensor_instructions == 0:
        found.append("no tensor-core instruction")
    if row.kernel.endswith(GEMMS) and row.target in ("sm_90", "sm_100") and row.wgmma_instructions == 0:
        found.append("no product that reads shared memory")
    if row.kernel.endswith(GEMMS) and row.target != "gfx942" and row.async_copies == 0:
        found.append("no asynchronous copy")
    by_descriptor = row.kernel.endswith(DESCRIBED) and row.target in ("sm_90", "sm_100")
    if by_descriptor and not row.configuration.endswith(POINTERS) and row.tma_copies == 0:
        found.append("no block is copied by its descriptor")
    if not by_descriptor and row.tma_copies > 0:
        found.append("descriptors where there is no engine for them")
    return found


GEMMS = (
    "product_kernel",
    "outer_kernel",
    "first_kernel",
    "activation_backward_kernel",
    "log_sums_kernel",
    "logit_gradients_kernel",
)
DESCRIBED = ("product_kernel", "outer_kernel", "first_kernel", "activation_backward_kernel")
POINTERS = ("pointers",)  # configurations that ask for them; wider numbers are not compiled by `one_each`


def test_every_kernel_on_every_target(costs: list[KernelCost]) -> None:
    bad = {(row.kernel, row.configuration, row.target): problems(row) for row in costs if problems(row)}
    assert not bad, bad
    kernels = {(row.op, row.kernel) for row in costs}
    assert {(row.op, row.kernel, row.target) for row in costs} == {(*k, target) for k in kernels for target in TARGETS}
    assert {op for op, _ in kernels} == set(OPS)


def test_no_kernel_is_forgotten(costs: list[KernelCost]) -> None:
    """Every function named ..._kernel in a Triton file is in the table."""
    names = set()
    for path in (ROOT / "kernels").glob("*/triton_*.py"):
        names |= {
            line.removeprefix("def ").split("(")[0].lstrip("_")
            for line in path.read_text().splitlines()
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
        }
    assert names == {row.kernel for row in costs}


def test_costs_are_the_committed_ones(costs: list[KernelCost]) -> None:
    """A change of a kernel or of Triton shows here; `moe kernels --out kernels/aot_costs.csv` writes the new table."""
    committed: dict[tuple[str, ...], dict[str, str]] = {}
    with (ROOT / "kernels" / "aot_costs.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            committed.setdefault((row["op"], row["kernel"], row["configuration"], row["target"]), row)
    changed = []
    for cost in costs:
        row = committed.get((cost.op, cost.kernel, cost.configuration, cost.target))
        if row is None or any(str(getattr(cost, name)) != value for name, value in row.items()):
            changed.append((cost, row))
    assert not changed, changed[:3]


def test_the_full_table_has_every_candidate_and_no_spill() -> None:
    """What `moe kernels` last found for all configurations, which pytest does not compile again."""
    with (ROOT / "kernels" / "aot_costs.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    spilling = [row for row in rows if row["spill_instructions"] != "0" or row["stack_bytes"] != "0"]
    assert not spilling, spilling[:3]
    assert not [row for row in rows if row["programs_per_processor"] == "0"]
    tma = {(row["kernel"], row["configuration"], row["target"]): int(row["tma_copies"]) for row in rows}
    for kernel, tiles in CANDIDATES.items():
        for target in ("sm_90", "sm_100"):
            missing = [tile for tile in tiles if not tma.get((f"{kernel}_kernel", f"bfloat16 {kernel} {tile}", target))]
            assert not missing, (kernel, target, missing)
            for tile in HALF_TILES:
                size = f"{tile.rows}x{tile.columns}x{tile.inner}"
                assert tma[f"{kernel}_kernel", f"bfloat16 {size}", target] > 0
                pointers = tile._replace(descriptors=False)
                assert tma[f"{kernel}_kernel", f"bfloat16 {kernel} {pointers}", target] == 0
    assert not [key for key, count in tma.items() if count and key[2] in ("sm_80", "gfx942")]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_rehearsed_and_in_the_full_table(activation: str) -> None:
    names = {f"bfloat16 {activation} {tile.size}" for tile in HALF_TILES}
    with recording(90):
        assert names <= set(triton_impl.rehearsals())
    with (ROOT / "kernels" / "aot_costs.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kernel"] == "first_kernel"]
    for target in TARGETS:
        assert names <= {row["configuration"] for row in rows if row["target"] == target}, target


@pytest.mark.parametrize(
    "change",
    [
        {"spill_instructions": 2},
        {"stack_bytes": 8},
        {"programs_per_processor": 0},
        {"tensor_instructions": 0},
        {"wgmma_instructions": 0},
        {"async_copies": 0},
        {"tma_copies": 0},
        {"error": "PTXASError: ..."},
    ],
    ids=str,
)
def test_a_worse_cost_is_noticed(change: dict[str, object], costs: list[KernelCost]) -> None:
    row = next(row for row in costs if row.kernel == "product_kernel" and row.target == "sm_90")
    assert problems(row) == []
    assert len(problems(replace(row, **change))) == 1


def test_descriptors_without_an_engine_are_noticed(costs: list[KernelCost]) -> None:
    row = next(row for row in costs if row.kernel == "product_kernel" and row.target == "sm_80")
    assert problems(replace(row, tma_copies=2)) == ["descriptors where there is no engine for them"]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets \(sm_70\) must be among: sm_80"):
        compile_all(targets=("sm_70",))
    with pytest.raises(ValueError, match=r"ops \(attention\) must be among"):
        compile_all(ops=("attention",))
