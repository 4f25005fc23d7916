"""The progress display: one live bar on a terminal, plain lines in a file or a pipe."""

from __future__ import annotations

import sys
import time
from typing import TextIO

from tqdm import tqdm

from moe.training.metrics import StepMetrics, Validation

PLAIN_LINE_SECONDS = 10.0  # a log file needs a sign of life, not every step


class Progress:
    """Shows loss, tokens per second and time left; the steps up to `first_step` count as done."""

    def __init__(self, *, first_step: int, num_steps: int, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._num_steps = num_steps
        self._first_step = first_step
        self._started_at = time.perf_counter()
        self._last_line_at = self._started_at - PLAIN_LINE_SECONDS
        self._bar = None
        if self._stream.isatty():
            self._bar = tqdm(total=num_steps, initial=first_step, unit="step", file=self._stream, dynamic_ncols=True)

    def step(self, metrics: StepMetrics) -> None:
        summary = f"loss {metrics.cross_entropy:.3f}  {metrics.tokens_per_second:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(summary, refresh=False)
            self._bar.update(1)
            return
        now = time.perf_counter()
        if now - self._last_line_at < PLAIN_LINE_SECONDS and metrics.step < self._num_steps:
            return
        self._last_line_at = now
        seconds_per_step = (now - self._started_at) / (metrics.step - self._first_step)
        left = (self._num_steps - metrics.step) * seconds_per_step
        self.message(f"step {metrics.step}/{self._num_steps}  {summary}  {left:,.0f} s left")

    def validation(self, step: int, domains: Validation) -> None:
        shown = "  ".join(f"{name} {figures['bits_per_byte']:.3f}" for name, figures in domains.items())
        self.message(f"step {step}: validation bits per byte  {shown}")

    def message(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
