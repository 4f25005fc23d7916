"""What is swept, and the rule that transfers the winners to other sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from moe.config.study import StudyConfig
from moe.scaling.study.design import DENSE, Arm, Design

Choices = dict[str, dict[str, float]]  # sweep name -> its winner, as {"optim.lr": 0.005}


@dataclass(frozen=True)
class Sweep:
    """One model and the grid it is trained on."""

    name: str  # key of its choice: the arm's name, or `dense at <size>` for the second size
    arm: Arm
    grid: dict[str, list[float]]

    @property
    def candidates(self) -> list[dict[str, float]]:
        """The grid's points, with the last field varying fastest."""
        return [dict(zip(self.grid, values, strict=True)) for values in product(*self.grid.values())]


def sweeps(study: StudyConfig, design: Design) -> list[Sweep]:
    """All sweeps. Raises ValueError if another size has an unswept arm, or two sizes cannot measure a power."""
    assert study.sweep is not None
    arms = design.of_size(study.sweep.size)
    missing = sorted({arm.name for arm in design.arms} - {arm.name for arm in arms})
    if missing:
        raise ValueError(
            f"sweep.size ({study.sweep.size}) has no {', '.join(missing)}, which other sizes have: a learning rate is "
            f"swept for every arm; add it to that size, or sweep at a size that has all"
        )
    found = [Sweep(arm.name, arm, study.sweep.grid) for arm in arms]
    second = study.sweep.second
    if second is not None:
        dense = [arm for arm in design.of_size(second.size) if arm.name == DENSE]
        if not dense or all(arm.name != DENSE for arm in arms):
            raise ValueError(
                f"sweep.second measures how the dense model's rates change with the width: {study.sweep.size} and "
                f"{second.size} must both have a dense model that is compared with all sparse ones"
            )
        width = _width(design, second.size)
        if width == _width(design, study.sweep.size):
            raise ValueError(
                f"sweep.size ({study.sweep.size}) and sweep.second.size ({second.size}) are both {width} wide: a "
                f"power of the width needs two widths"
            )
        found.append(Sweep(_second(second.size), dense[0], second.grid))
    return found


def winners(chosen: Mapping[str, Any]) -> Choices:
    """Only the settings from what moe.scaling.study.runs.choose found."""
    return {name: winner["optim"] for name, winner in chosen.items()}


def first_choices(study: StudyConfig, design: Design) -> Choices:
    """Each grid's first point, for use until a winner is chosen."""
    return {} if study.sweep is None else {swept.name: swept.candidates[0] for swept in sweeps(study, design)}


def width_powers(study: StudyConfig, design: Design, choices: Choices) -> dict[str, float]:
    """The power of d_model by which each swept field changes.

    Either given (optim.lr only), or log(ratio of the dense winners) / log(ratio of widths) between the two swept sizes.
    """
    assert study.sweep is not None
    second = study.sweep.second
    if second is None:
        return {key: study.sweep.width_power if key == "optim.lr" else 0.0 for key in study.sweep.grid}
    widths = math.log(_width(design, second.size) / _width(design, study.sweep.size))
    small, large = choices[DENSE], choices[_second(second.size)]
    return {key: math.log(large[key] / small[key]) / widths for key in study.sweep.grid}


def transferred(study: StudyConfig, design: Design, arm: Arm, choices: Choices) -> dict[str, float]:
    """The settings for an arm of any size: its winner's fields times (d_model / the swept d_model) ^ their powers."""
    if study.sweep is None:
        return {}
    ratio = arm.config.model.d_model / _width(design, study.sweep.size)
    powers = width_powers(study, design, choices)
    return {key: value * ratio ** powers[key] for key, value in choices[arm.name].items()}


def transfer_rule(study: StudyConfig, design: Design, choices: Choices) -> str:
    """The rule in words, for the report; `choices` is empty until winners are chosen."""
    if study.sweep is None:
        return "No sweep: every run has the learning rate that the study states."
    fields, size, second = ", ".join(study.sweep.grid), study.sweep.size, study.sweep.second
    winners = f"Each arm's {fields} is the winner of the same grid at size {size} on the validation split"
    between = "" if second is None else f" The powers are those between the dense winners at {size} and {second.size}."
    if second is not None and not choices:
        return f"{winners}; other sizes take powers of the width.{between}"
    powers = width_powers(study, design, choices)
    moved = [f"{key} times (d_model / that of {size})^{power:.3g}" for key, power in powers.items() if power]
    kept = [f"{key} as it is" for key, power in powers.items() if not power]
    return f"{winners}; other sizes take {', '.join([*moved, *kept])}.{between}"


def _second(size: str) -> str:
    return f"{DENSE} at {size}"


def _width(design: Design, size: str) -> int:
    return design.of_size(size)[0].config.model.d_model
