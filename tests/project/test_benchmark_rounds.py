"""How often the benchmarks call what they measure: once to check it, then in turns, and slow ones no more than that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import clock, models
from benchmarks import suite as suite_module
from benchmarks.clock import Clock, Sample, Timed
from benchmarks.contender import Contender, Cost
from benchmarks.suite import Options, Suite, WrongResultError

CPU = torch.device("cpu")


def sample(seconds: float) -> Sample:
    return Sample(seconds / 3, seconds, seconds, seconds)


def giving(name: str, forward: Callable[[], Tensor], reference: Contender | None = None) -> Contender:
    """Something that takes no time and is compared by what it returns."""
    return Contender(name, forward, Cost(flops=10.0, bytes=10.0), outcome=lambda y, _: {"y": y}, reference=reference)


def test_everything_runs_in_turn_and_slow_peers_are_called_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(clock, "SAMPLE_SECONDS", 1e-9)

    def named(name: str, **options: object) -> Timed:
        return Timed(name, lambda: calls.append(name), **options)

    everything = [named("ours"), named("few", rounds=2), named("peer", peer=True), named("slow", peer=True)]
    first = {"ours": sample(9.0), "few": sample(9.0), "peer": sample(2.9), "slow": sample(3.1)}
    samples = clock.interleave(Clock(CPU, 1), everything, 3, first)
    assert calls == ["ours", "few", "peer"] * 2 + ["ours", "peer"]  # ours runs in every round, however slow
    assert samples["slow"] == [first["slow"], None, None]  # the call that checked it
    assert [each is None for each in samples["few"]] == [False, False, True]
    calls.clear()
    samples = clock.interleave(Clock(CPU, 1), everything, 3, first, patient=True)
    assert calls.count("slow") == 3
    assert None not in samples["slow"] and first["slow"] not in samples["slow"]
    calls.clear()
    clock.interleave(Clock(CPU, 1), everything[3:], 2, {"slow": sample(0.01)})
    assert calls == ["slow"] * 3  # a short call is tried once more before


def test_rows_that_nothing_is_required_of_take_few_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "QUICK_ROUNDS", 5)

    def rounds(case_few: bool, **options: object) -> dict[str, int]:
        suite = Suite(Options(flops=True, quick=True, **options))
        ours, extra = (giving(name, lambda: torch.ones(1)) for name in ("ours", "extra"))
        suite.run("case", [ours, replace(extra, few=True)], few=case_few)
        return {row.name: row.rounds for row in suite.rows}

    assert rounds(False) == {"ours": 5, "extra": 3}
    assert rounds(True) == {"ours": 3, "extra": 3}
    assert rounds(True, full=True) == {"ours": 5, "extra": 5}
    assert rounds(True, rounds=2) == {"ours": 2, "extra": 2}


def test_the_row_that_others_are_checked_by_is_called_once_for_that() -> None:
    calls: list[str] = []

    def called(name: str, value: float, reference: Contender | None = None) -> Contender:
        def forward() -> Tensor:
            calls.append(name)
            return torch.tensor([value])

        return giving(name, forward, reference)

    theirs = called("theirs", 1.0)
    ours, shown = called("ours", 1.0, theirs), replace(theirs, unchecked="the reference")
    suite = Suite(Options())
    suite.run("case", [ours, shown])
    assert calls == ["theirs", "ours"]
    with pytest.raises(WrongResultError, match="ours"):
        suite.run("case", [called("ours", 1.1, theirs), shown])
    suite = Suite(Options(flops=True, quick=True, rounds=1))
    suite.run("case", [ours, shown])
    assert [row.name for row in suite.rows] == ["ours", "theirs"]  # in the order of the table
    assert suite.rows[0].to_first == 1.0 != suite.rows[1].to_first  # and ours is still the first


def test_optimizer_states_that_were_made_before_change_no_step() -> None:
    gradient = torch.arange(-3.0, 3.0)
    for options in ({"fused": True}, {"foreach": True}):
        made, plain = (torch.nn.Parameter(torch.ones(6)) for _ in range(2))
        optimizers = [
            models.adamw([made], **options),
            torch.optim.AdamW([plain], lr=models.STILL, betas=(0.9, 0.98), weight_decay=0.0, **options),
        ]
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 0.1
        for _ in range(3):
            for leaf, optimizer in zip((made, plain), optimizers, strict=True):
                leaf.grad = gradient.clone()
                optimizer.step()
        assert torch.equal(made, plain) and not torch.equal(made, torch.ones(6))
        assert optimizers[0].state[made].keys() == optimizers[1].state[plain].keys()
