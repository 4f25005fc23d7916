"""A program: real training steps in this process, what they took and what was planned, as one JSON object.

`python measured_step.py OVERRIDES`: of `moe plan cluster=this_machine`. Times are the processor's own, of one thread,
so that a busy machine changes them little; its rates are measured between the steps.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from moe.cli.plan import MachineRates, measure_machine
from moe.compose import compose_top
from moe.config import RunConfig
from moe.config.cluster import PlanConfig
from moe.distributed.world import World
from moe.layers.experts import Experts
from moe.model import Transformer
from moe.scaling.memory import plan_memory
from moe.scaling.planner import run_config
from moe.scaling.step_time import step_time
from moe.training.allocator import keep_freed_memory
from moe.training.loss import compute_loss
from moe.training.optimizer import gradient_norm, make_optimizer

STEPS = 2


def main(overrides: list[str]) -> None:
    config = compose_top("plan", PlanConfig, ["cluster=this_machine", *overrides])
    run = run_config(config)
    torch.set_num_threads(1)
    keep_freed_memory()
    compute_loss_of_nothing()
    before = resident_bytes("VmRSS")
    step = Step(run)
    step()
    step()
    peak = resident_bytes("VmHWM")
    rates, seconds = [measure_machine(repeats=3, clock=time.process_time)], []
    for _ in range(STEPS):
        started_at = time.process_time()
        step()
        seconds.append(time.process_time() - started_at)
        rates.append(measure_machine(repeats=3, clock=time.process_time))
    typical = MachineRates(*(statistics.median(values) for values in zip(*rates, strict=True)))
    cluster = replace(config.cluster, **typical._asdict())
    share = {"sequences": run.micro_batch_size, "micro_batches": run.batch_size // run.micro_batch_size}
    planned = step_time(run, cluster, 1, None, **share)
    memory = plan_memory(run, 1, None, device="cpu", **share)
    figures = {
        "seconds": statistics.median(seconds),
        "planned_seconds": planned.seconds,
        "bytes": peak - before,
        "planned_bytes": memory.peak_bytes,
        "bottleneck": planned.bottleneck,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


class Step:
    """The step of a training run of one process."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.model = Transformer(run.model, recompute=run.train.recompute)
        self.model.reset_parameters(run.seed)
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.persistent_grad(True)
        self.optimizer = make_optimizer(self.model, run.optim)
        self.world = World(0, 1, torch.device("cpu"), None, math.inf)
        assert run.model.vocab_size is not None
        self.tokens = torch.randint(run.model.vocab_size, (run.batch_size, run.seq_len))

    def __call__(self) -> None:
        parts = self.tokens.split(self.run.micro_batch_size)
        for tokens in parts:
            output = self.model(tokens, tokens)
            (compute_loss(output, None, self.run.model.moe, None).loss / len(parts)).backward()
            del output
        gradient_norm(self.model.parameters(), self.world)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def compute_loss_of_nothing() -> None:
    """A step of a model of a few numbers, so that what libraries load and keep is there before anything is measured."""
    small = ["model.d_model=16", "model.d_ff=16", "model.num_heads=2", "train.batch_tokens=512", "+moe=8e"]
    Step(run_config(compose_top("plan", PlanConfig, ["cluster=this_machine", *small])))()


def resident_bytes(field: str) -> int:
    """Not getrusage's peak: that is the parent's, where the parent had more when it started this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main(sys.argv[1:])
