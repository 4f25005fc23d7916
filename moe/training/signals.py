"""SIGTERM and SIGINT become a flag, so that a step is never cut in half."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

import torch

from moe.distributed.world import World


class StopRequest:
    """While active, the first SIGTERM or SIGINT sets `signal_name`; a second one acts as it did before."""

    signal_name: str | None = None

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():  # Python delivers signals to no other thread
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def signal_of_any_rank(stop: StopRequest, world: World) -> str | None:
    """The signal that a rank received, with the rank, the same answer on all; every rank must call this."""
    if world.size == 1:
        return stop.signal_name
    own = 0 if stop.signal_name is None else signal.Signals[stop.signal_name].value
    for rank, number in enumerate(world.gather(torch.tensor(own, device=world.device))):
        if int(number):
            return f"{signal.Signals(int(number)).name} on rank {rank}"
    return None
