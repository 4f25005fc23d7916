"""The least time that each work takes on each device, and what sets it."""

from __future__ import annotations

from typing import NamedTuple

from .devices import LAUNCH_SECONDS, Device
from .products import Run, Work
from .tiles import Compiled, Step, compiled, step_of


class Bound(NamedTuple):
    """Lower bounds for one work on one device, in seconds, and how its tiles fill the processors."""

    work: Work
    device: Device
    compute_seconds: float  # executed FLOPs at the device's peak, or vector operations if they take longer
    memory_seconds: float  # bytes as tiled, at the memory bandwidth
    launch_seconds: float  # launches at LAUNCH_SECONDS
    tiled_bytes: float
    ideal_seconds: float  # useful FLOPs at the peak or compulsory bytes at the bandwidth: no kernel is faster
    tile_seconds: float  # steps of the busiest processor, each bound by issue or by shared-memory reads
    one_path_seconds: float  # the same if filling shared memory delays reading it
    l2_seconds: float  # what tiles read one by one, and all else, from the L2 cache at its rate
    compiled: Compiled | None = None  # this and the next three: None for a work without tiles
    resident: int | None = None  # programs that share a processor
    step: Step | None = None
    waves: float | None = None  # tiles over those that run together

    @property
    def bound(self) -> str:
        """Which of the three takes longest: "compute", "memory" or "launch"."""
        return max(("compute", "memory", "launch"), key=lambda name: getattr(self, f"{name}_seconds"))

    @property
    def seconds(self) -> float:
        """The longest of the three: the roofline of what is executed."""
        return max(self.compute_seconds, self.memory_seconds, self.launch_seconds)

    @property
    def estimate_seconds(self) -> float:
        """`seconds`, but no less than the tile's own pace on the busiest processor takes."""
        return max(self.seconds, self.tile_seconds)

    @property
    def cautious_seconds(self) -> float:
        """The estimate if filling shared memory delays reading it and the L2 cache delivers only its stated rate."""
        return max(self.seconds, self.one_path_seconds, self.l2_seconds)

    def peak_share(self, seconds: float) -> float:
        """Useful FLOPs in `seconds`, as a share of the peak."""
        return self.work.useful_flops / seconds / self.device.flops_per_second

    @property
    def busy_share(self) -> float | None:
        """Mean steps per processor over those of the busiest, over all launches; None without tiles or steps."""
        steps = sum(run.tiles * run.steps for grid in self.work.grids for run in grid)
        busiest = sum(busiest_steps(grid, self.device.processors) for grid in self.work.grids)
        return steps / (self.device.processors * busiest) if busiest else None


def bound_of(work: Work, device: Device, *, resources: Compiled | None = None) -> Bound:
    """Bounds of `work` on `device`.

    resources: of its kernel; `None` reads them from aot_costs.csv and raises ValueError if they are missing. The
    programs that run together are those started per processor, as far as they fit.
    """
    ideal = max(work.useful_flops / device.flops_per_second, work.compulsory_bytes / device.bytes_per_second)
    vector_seconds = work.ops / (device.vector_flops_per_second / 2)  # one operation is half a multiply-add
    compute = max(work.executed_flops / device.flops_per_second, vector_seconds)
    launch = work.launches * LAUNCH_SECONDS
    l2_seconds = work.requested_bytes / (device.l2_bytes_per_cycle * device.clock_hz)
    if work.tile is None:
        tiled = work.fixed_bytes + (0 if work.walk is None else work.walk.memory_bytes(1, device.cache_bytes))
        memory = tiled / device.bytes_per_second
        return Bound(work, device, compute, memory, launch, tiled, ideal, compute, compute, l2_seconds)
    assert work.walk is not None  # a work with tiles has an order of them
    if resources is None:
        resources = compiled(work.compiled_op, work.kernel, work.configuration, work.tile, device.target)
    resident = min(work.tile.per_processor, resources.programs)
    in_flight = device.processors * resident
    tiled = work.fixed_bytes + work.walk.memory_bytes(in_flight, device.cache_bytes)
    step = step_of(work.tile, work.matrices, resources.instruction, device)
    busiest = sum(busiest_steps(grid, device.processors) for grid in work.grids)
    return Bound(
        work=work,
        device=device,
        compute_seconds=compute,
        memory_seconds=tiled / device.bytes_per_second,
        launch_seconds=launch,
        tiled_bytes=tiled,
        ideal_seconds=ideal,
        tile_seconds=busiest * step.cycles / device.clock_hz,
        one_path_seconds=busiest * step.one_path_cycles / device.clock_hz,
        l2_seconds=l2_seconds,
        compiled=resources,
        resident=resident,
        step=step,
        waves=work.num_tiles / in_flight,
    )


def busiest_steps(grid: tuple[Run, ...], processors: int) -> int:
    """Steps of the busiest processor when tiles are dealt out in turn, as persistent programs take them."""
    everyone, own, next_one = 0, [0] * processors, 0
    for tiles, steps in grid:
        everyone += tiles // processors * steps
        for i in range(tiles % processors):
            own[(next_one + i) % processors] += steps
        next_one = (next_one + tiles) % processors
    return everyone + max(own)
