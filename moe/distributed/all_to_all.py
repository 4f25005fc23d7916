"""A differentiable, uneven all-to-all of rows, with separate start and finish so that other work fits in between.

Works with gloo, NCCL and torch's fake backend. `count_traffic` counts everything sent.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Traffic:
    """This rank's share of what the all-to-alls in a block of code sent."""

    def __init__(self) -> None:
        self.calls = 0
        self.row_bytes = 0  # rows and their gradients, to other ranks
        self.count_bytes = 0  # the counts that announce them, to other ranks
        self.seconds = 0.0  # that this host waited; on a GPU the device waits instead
        self.rows_received = 0  # by this rank's experts, in forward passes only
        self.peak_rows = 0  # the most in one pass


# innermost last; per process, because on a GPU another thread runs the backward, and recomputes and sends there
_counting: list[Traffic] = []


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what is sent inside the block, and later by backward passes of what ran in it."""
    traffic = Traffic()
    _counting.append(traffic)
    try:
        yield traffic
    finally:
        _counting.remove(traffic)


def current_traffic() -> Traffic | None:
    """The counter of the innermost `count_traffic`; None outside of one."""
    return _counting[-1] if _counting else None


class Transfer:
    """One all-to-all in flight: the receive buffer, and the handle to wait for."""

    def __init__(self, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> None:
        self.send = list(send)  # rows for each rank of `group`
        self.receive = list(receive)  # rows from each
        self.group = group
        self.traffic = current_traffic()  # kept for the backward, which may run after the block that counts
        self._work: Any = None
        self._arriving: Tensor | None = None

    def start(self, rows: Tensor, *, back: bool = False) -> Tensor:
        """Begin to send `rows` (R, ...); returns the receive buffer, to be read after `wait`."""
        send, receive = (self.receive, self.send) if back else (self.send, self.receive)
        arriving = rows.new_empty(sum(receive), *rows.shape[1:])
        if self.traffic is not None:
            own = dist.get_rank(self.group)
            self.traffic.calls += 1
            self.traffic.row_bytes += (sum(send) - send[own]) * rows[0:1].numel() * rows.element_size()
        self._work = dist.all_to_all_single(arriving, rows.contiguous(), receive, send, group=self.group, async_op=True)
        self._arriving = arriving
        return arriving

    def wait(self) -> Tensor:
        """Wait for all rows and return them."""
        started_at = time.perf_counter()
        self._work.wait()
        arrived, self._work, self._arriving = self._arriving, None, None
        assert arrived is not None
        if self.traffic is not None:
            self.traffic.seconds += time.perf_counter() - started_at
        return arrived


def all_to_all(rows: Tensor, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The first send[0] rows go to rank 0 of `group`, the next send[1] to rank 1, ...; differentiable.

    (sum(send), ...) -> (sum(receive), ...), in the order of the source ranks.
    """
    transfer = Transfer(send, receive, group)
    return finish(start(rows, transfer), transfer)


def start(rows: Tensor, transfer: Transfer) -> Tensor:
    """Begin an all-to-all. The result holds no data until `finish`. The backward pass waits for the gradient."""
    result: Tensor = _Start.apply(rows, transfer)
    return result


def finish(arriving: Tensor, transfer: Transfer) -> Tensor:
    """Wait for what `start` began. The backward pass begins to send the gradient back."""
    result: Tensor = _Finish.apply(arriving, transfer)
    return result


def refuse_second_derivatives() -> None:
    """Call in a backward that cannot be differentiated: a second derivative would silently lack its part."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "create_graph=True differentiates the backward pass, and that of experts on several ranks has no "
            "derivative: leave it out, or keep all experts on one rank (parallel.ep_size=1)"
        )


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        return transfer.start(rows)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        refuse_second_derivatives()
        return ctx.transfer.wait(), None  # the incoming gradient is only the tensor that was sent


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, arriving: Tensor, transfer: Transfer) -> Tensor:
        ctx.transfer = transfer
        transfer.wait()
        return arriving.view_as(arriving)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        refuse_second_derivatives()
        ctx.transfer.start(grads[0], back=True)
        return grads[0], None  # has the shape autograd expects; `_Start` waits for the real gradient


def exchange_counts(counts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Row i of `counts` (P, N) goes to rank i; row i of the result comes from rank i."""
    arriving = torch.empty_like(counts)
    dist.all_to_all_single(arriving, counts.contiguous(), group=group)
    traffic = current_traffic()
    if traffic is not None:
        traffic.calls += 1
        traffic.count_bytes += (counts.shape[0] - 1) * counts[0].numel() * counts.element_size()
    return arriving
