"""Dynamic loss scaling for float16, in which small gradients underflow to zero (Micikevicius et al. 2018)."""

from __future__ import annotations

from moe.checkpoint import TrainState

FIRST_SCALE = 2.0**16
LOWEST_SCALE = 1.0  # an overflow at this scale is a real one
GROWTH_STEPS = 2000  # updates without an overflow before the scale doubles


def update_scale(state: TrainState, *, finite: bool) -> bool:
    """Halve the scale after a step that overflowed, double it after GROWTH_STEPS steps that did not.

    Returns False if the step was not finite and the scale does not explain it, else True. The decision depends on the
    norm over all ranks' gradients, so every rank makes the same one.
    """
    assert state.loss_scale is not None
    if finite:
        state.steps_since_overflow += 1
        if state.steps_since_overflow == GROWTH_STEPS:
            state.loss_scale *= 2.0
            state.steps_since_overflow = 0
        return True
    explained = state.loss_scale > LOWEST_SCALE
    state.loss_scale = max(state.loss_scale / 2.0, LOWEST_SCALE)
    state.steps_since_overflow = 0
    return explained
