"""The GPUs of the roofline: rates from their vendors' documents, none of them measured."""

from __future__ import annotations

from typing import NamedTuple

SHARED_BYTES_PER_CYCLE = 128  # per processor: 32 banks of 4 bytes (CUDA programming guide; CDNA 3 LDS likewise)

# Assumed, since no data sheet states it: from one kernel of a stream to the next, if neither does anything.
LAUNCH_SECONDS = 5e-6


class Device(NamedTuple):
    """One GPU. Rates are peaks: dense 16-bit products summed in float32, decimal units, at the stated clock."""

    name: str
    target: str  # the name `moe kernels` compiles for
    flops_per_second: float  # bfloat16 or float16, dense
    vector_flops_per_second: float  # float32 outside the tensor cores, a multiply-add being 2
    bytes_per_second: float  # of its memory
    l2_bytes: int
    l2_bytes_per_cycle: int  # delivered to all processors together
    cache_bytes: int  # the last cache before memory, shared by all processors; the L2 cache on NVIDIA GPUs
    processors: int  # SMs or CUs
    clock_hz: float  # at which flops_per_second is stated
    source: str

    @property
    def products_per_cycle(self) -> int:
        """Multiply-adds per cycle of one processor's tensor cores: 2048 on an H100, 1024 on an A100 and an MI300X."""
        return round(self.flops_per_second / (2 * self.processors * self.clock_hz))  # data sheets give 3 or 4 digits

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which arithmetic takes longer than memory."""
        return self.flops_per_second / self.bytes_per_second


DEVICES = {
    device.target: device
    for device in (
        Device(
            name="H100 SXM",
            target="sm_90",
            flops_per_second=989.4e12,
            vector_flops_per_second=66.9e12,
            bytes_per_second=3.35e12,
            l2_bytes=50 * 2**20,
            l2_bytes_per_cycle=5120,
            cache_bytes=50 * 2**20,
            processors=132,
            clock_hz=1.83e9,
            source="NVIDIA H100 Tensor Core GPU data sheet; NVIDIA H100 Tensor Core GPU Architecture white paper "
            "(1830 MHz is its clock for tensor cores; the rate of its L2 cache is not stated, the A100's is assumed)",
        ),
        Device(
            name="A100 SXM 80GB",
            target="sm_80",
            flops_per_second=312e12,
            vector_flops_per_second=19.5e12,
            bytes_per_second=2.039e12,
            l2_bytes=40 * 2**20,
            l2_bytes_per_cycle=5120,
            cache_bytes=40 * 2**20,
            processors=108,
            clock_hz=1.41e9,
            source="NVIDIA A100 Tensor Core GPU data sheet; NVIDIA A100 Tensor Core GPU Architecture white paper",
        ),
        Device(
            name="MI300X",
            target="gfx942",
            flops_per_second=1307.4e12,
            vector_flops_per_second=163.4e12,
            bytes_per_second=5.3e12,
            l2_bytes=8 * 4 * 2**20,  # 4 MiB on each of eight dies
            l2_bytes_per_cycle=8 * 16 * 128,  # 16 channels of 128 bytes on each die
            cache_bytes=256 * 2**20,  # Infinity Cache
            processors=304,
            clock_hz=2.1e9,
            source="AMD Instinct MI300X data sheet; AMD CDNA 3 white paper",
        ),
    )
}
