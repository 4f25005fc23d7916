"""Every Triton kernel compiled for GPUs that need not be present, and what it costs on them.

Compilation needs no GPU, and the machine code shows what a profiler would say first: registers, spills, shared memory,
how many programs fit on a processor, whether products reach the tensor cores. It does not show how fast a kernel runs.
Separate processes do the work, since TRITON_INTERPRET and other settings are read when kernels are decorated.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .launch import Launch, recording, register_limit

OPS = ("grouped_gemm", "permute", "topk_routing", "expert_ffn", "linear_cross_entropy")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
SETTINGS_OF_THE_PARENT = ("TRITON_INTERPRET", "TRITON_KERNEL_OVERRIDE", "TRITON_ALWAYS_COMPILE")

# of a processor: registers, KiB of shared memory, KiB of it reserved per block, warps, blocks
# (CUDA C++ programming guide, table of technical specifications per compute capability)
PROCESSORS = {"sm_80": (65536, 164, 1, 64, 32), "sm_90": (65536, 228, 1, 64, 32), "sm_100": (65536, 228, 1, 64, 32)}
TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


@dataclass(frozen=True)
class KernelCost:
    """The cost of one kernel in one configuration on one target; `error` is the compiler's message if it failed."""

    op: str
    kernel: str
    configuration: str  # the rehearsal it was compiled for, such as "bfloat16 128x128x64"
    target: str
    num_warps: int
    num_stages: int
    registers: int = 0  # per thread; gfx942: vector registers per lane
    stack_bytes: int = 0
    spill_instructions: int = 0  # loads from and stores to local memory; gfx942: spilled registers
    shared_bytes: int = 0  # per program
    programs_per_processor: int = 0  # limited by registers, shared memory, warps and blocks
    tensor_instructions: int = 0  # HMMA, HGMMA, UTCxMMA, v_mfma and similar
    wgmma_instructions: int = 0  # of these, those that read whole blocks from shared memory (sm_90 and later)
    async_copies: int = 0  # from global to shared memory
    tma_copies: int = 0  # of these, those that copy a whole block by descriptor (UTMALDG, sm_90 and later)
    scratch_bytes: int = 0  # global memory that a program needs for its descriptors
    compile_seconds: float = 0.0
    error: str | None = None


class _Job(NamedTuple):
    op: str
    configuration: str
    launch: Launch


def compile_all(
    *,
    targets: tuple[str, ...] = TARGETS,
    ops: tuple[str, ...] = OPS,
    one_each: bool = False,
    processes: int | None = None,
    cache_dir: Path | None = None,
    out: Path | None = None,
) -> list[KernelCost]:
    """Compile the kernels of `ops` for `targets` and return what each costs, in a fixed order.

    one_each: only the first configuration of each kernel. processes: `None` is one per CPU. Results are cached in
    cache_dir (`None`: moe/kernels below XDG_CACHE_HOME or ~/.cache) by hash of source, arguments, Triton version and
    target. out: also write the table there as JSON. A kernel that does not compile gives a row with its error. Raises
    ValueError for unknown targets or ops, RuntimeError if a process fails.
    """
    for name, given, known in (("targets", targets, TARGETS), ("ops", ops, OPS)):
        if unknown := [value for value in given if value not in known]:
            raise ValueError(f"{name} ({', '.join(unknown)}) must be among: {', '.join(known)}")
    cache_dir = _default_cache() if cache_dir is None else cache_dir
    cache_dir.mkdir(parents=True, exist_ok=True)
    count = max(1, len(os.sched_getaffinity(0)) if processes is None else processes)
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS_OF_THE_PARENT}
    environment |= {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    with tempfile.TemporaryDirectory(prefix="moe-kernels-") as folder:
        environment["TRITON_CACHE_DIR"] = folder  # the compiled code will never run, so it need not stay
        command = [sys.executable, "-m", f"{__package__}.aot", "--targets", *targets, "--ops", *ops]
        command += ["--cache", str(cache_dir), *(["--one-each"] if one_each else [])]
        workers = [
            subprocess.Popen(
                [*command, "--share", str(i), str(count), "--out", f"{folder}/{i}.json"],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(count)
        ]
        outputs = [worker.communicate()[0] for worker in workers]
        for worker, output in zip(workers, outputs, strict=True):
            if worker.returncode != 0:
                raise RuntimeError(f"compiling the kernels failed:\n{output}")
        found = [entry for i in range(count) for entry in json.loads(Path(f"{folder}/{i}.json").read_text())]
    rows = [KernelCost(**row) for _, row in sorted(found, key=lambda entry: entry[0])]
    if out is not None:
        out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return rows


def _default_cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "moe" / "kernels"


def _jobs(ops: list[str], target: str, one_each: bool) -> Iterator[_Job]:
    """Each kernel, once per configuration in which its op's launchers start it on the target."""
    seen: set[Any] = set()
    for op in ops:
        module = importlib.import_module(f".{op}.triton_impl", __package__)
        with recording(_capability(target)):
            cases = module.rehearsals()
        for configuration, rehearse in cases.items():
            with recording(_capability(target)) as launches:
                rehearse()
            for entry in launches:
                name = entry.kernel.__name__
                how = (entry.num_warps, entry.num_stages, entry.max_registers)
                key = name if one_each else (name, str(_signature(entry)), how)
                if key not in seen:
                    seen.add(key)
                    yield _Job(op, configuration, entry)


def _signature(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], list[list[Any]]]]:
    """Types, constants and divisibility of a kernel's arguments, as Triton's own launcher would infer them."""
    types: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_special and type(value) is int and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            types[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            types[parameter.name] = "fp32"
        else:
            types[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if is_special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return types, constants, attributes


def _measure(job: _Job, target: str, cache: Path) -> KernelCost:
    """The cost of a job, from the cache if it is known."""
    import triton  # only in the processes that compile

    types, constants, attributes = _signature(job.launch)
    options = {"num_warps": job.launch.num_warps, "num_stages": job.launch.num_stages}
    if target.startswith("sm_"):
        options["maxnreg"] = register_limit(_capability(target), job.launch.num_warps, job.launch.max_registers)
    key = f"{job.launch.kernel.cache_key}{types}{constants}{attributes}{options}{triton.__version__}{target}"
    key += Path(__file__).read_text()  # this file decides what is measured, and how
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if path.exists():
        known: dict[str, Any] = json.loads(path.read_text())
        return KernelCost(**known | {"op": job.op, "configuration": job.configuration})
    row: dict[str, Any] = {
        "op": job.op,
        "kernel": job.launch.kernel.__name__.lstrip("_"),
        "configuration": job.configuration,
        "target": target,
        "num_warps": job.launch.num_warps,
        "num_stages": job.launch.num_stages,
    }
    source = triton.compiler.ASTSource(job.launch.kernel, types, constants, attributes)
    started = time.perf_counter()
    try:
        compiled = triton.compile(source, target=_gpu_target(target), options=options)
    except Exception as error:  # from any stage of any compiler: the table shows kernel and error
        return KernelCost(**row, error=f"{type(error).__name__}: {error}"[:2000])
    row["compile_seconds"] = round(time.perf_counter() - started, 3)
    row["shared_bytes"] = compiled.metadata.shared
    row |= _amd_costs(compiled, job.launch) if target.startswith("gfx") else _nvidia_costs(compiled, target, job.launch)
    cost = KernelCost(**row)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(asdict(cost)))
    aside.replace(path)  # another process may be writing the same entry
    return cost


def _gpu_target(target: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if target.startswith("gfx"):
        return GPUTarget("hip", target, 64)
    return GPUTarget("cuda", _capability(target), 32)


def _capability(target: str) -> int:
    """90 for sm_90; 0 for GPUs of other vendors."""
    return int(target.removeprefix("sm_")) if target.startswith("sm_") else 0


def _nvidia_costs(compiled: Any, target: str, launch: Launch) -> dict[str, int]:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(tools / "nvdisasm", "-c", file.name)
    registers = int(_only(r"REG:(\d+)", usage))
    total, shared_kib, overhead_kib, warps, blocks = PROCESSORS[target]
    per_warp = -(-32 * registers // 256) * 256  # registers are allocated in units of 256
    room = (
        total // (per_warp * launch.num_warps),
        shared_kib * 1024 // (compiled.metadata.shared + overhead_kib * 1024),
        warps // launch.num_warps,
        blocks,
    )
    return {
        "registers": registers,
        "stack_bytes": int(_only(r"STACK:(\d+)", usage)),
        "spill_instructions": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "programs_per_processor": min(room),
        "tensor_instructions": len(re.findall(r"\b(?:[HIDQ]G?MMA|UTC\w*MMA)\b", code)),
        "wgmma_instructions": len(re.findall(r"\b(?:[HIQ]GMMA|UTC\w*MMA)\b", code)),
        "async_copies": len(re.findall(r"\b(?:LDGSTS|UTMALDG|UBLKCP)\b", code)),
        "tma_copies": len(re.findall(r"\bUTMALDG\b", code)),
        "scratch_bytes": compiled.metadata.global_scratch_size,
    }


def _amd_costs(compiled: Any, launch: Launch) -> dict[str, int]:
    code = compiled.asm["amdgcn"]
    registers = int(_only(r"\.vgpr_count:\s*(\d+)", code))
    # 512 vector registers per lane on each of 4 SIMDs, in units of 8; at most 8 waves per SIMD; 64 KiB shared memory
    waves = min(8, 512 // (-(-max(registers, 1) // 8) * 8)) * 4
    room = min(waves // launch.num_warps, 65536 // max(compiled.metadata.shared, 1))
    return {
        "registers": registers,
        "stack_bytes": int(_only(r"\.private_segment_fixed_size:\s*(\d+)", code)),
        "spill_instructions": int(_only(r"\.vgpr_spill_count:\s*(\d+)", code)),
        "programs_per_processor": room,
        "tensor_instructions": len(re.findall(r"\bv_mfma_", code)),
        "async_copies": len(re.findall(r"\b(?:global|buffer)_load\w*_lds|\bbuffer_load_dword\w* .*\blds\b", code)),
    }


def _output(program: Path, *arguments: str) -> str:
    return subprocess.run([str(program), *arguments], capture_output=True, text=True, check=True).stdout


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(f"the tool's output lacks {pattern!r}: {text[:500]}")
    return match.group(1)


def _work() -> None:
    parser = argparse.ArgumentParser(description="one share of compile_all, which starts it")
    parser.add_argument("--targets", nargs="+", required=True)
    parser.add_argument("--ops", nargs="+", required=True)
    parser.add_argument("--share", nargs=2, type=int, required=True)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--one-each", action="store_true")
    given = parser.parse_args()
    share, shares = given.share
    # launchers choose by GPU, so each target has its own jobs
    pairs = [(job, target) for target in given.targets for job in _jobs(given.ops, target, given.one_each)]
    pairs.sort(key=lambda pair: given.ops.index(pair[0].op))
    rows = [
        (i, asdict(_measure(job, target, given.cache))) for i, (job, target) in enumerate(pairs) if i % shares == share
    ]
    given.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    _work()
