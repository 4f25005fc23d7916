"""Which tasks are trained on and which evaluated, at three levels of generalisation (Iyer et al. 2022).

1. held-out category: no task of its category is trained on;
2. held-out task: its category is trained on, the task is not;
3. held-out instances: the task is trained on, these examples are not.

Training tasks share no data source with evaluated tasks of levels 1 and 2.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe.instruct.definition import Splits
from moe.instruct.readers.tasks import Example, TaskInfo

EVALUATED = ("validation", "test")
LEVELS = {1: "held-out category", 2: "held-out task", 3: "held-out instances"}
# if a held-out task lacks a published split of the wanted name, the nearest one it has
_NEAREST = {"validation": ("validation", "test", "all", "train"), "test": ("test", "validation", "all", "train")}


class Role(NamedTuple):
    """How a task is used."""

    trains: bool
    evaluates: tuple[str, ...]  # from EVALUATED
    level: int | None  # a key of LEVELS; None for a task that is only trained on


class Plan(NamedTuple):
    """The roles of all remaining tasks, and why the others were removed."""

    roles: dict[str, Role]
    removed: dict[str, str]


def plan_splits(infos: Sequence[TaskInfo], splits: Splits, seed: int) -> Plan:
    """Assign every task its role.

    Raises ValueError for an unknown task or category name, one that is held out twice, a task held out by name whose
    category has no other task to train on, `evaluation_only` tasks that would be trained on, and, with
    on_shared_source="stop", training and evaluation tasks with one data source, naming the pairs.
    """
    names = {info.name: info for info in infos}
    removed = {name: f"excluded: {reason}" for name, reason in splits.exclude.items()}
    _require_known(splits.exclude, names, "exclude")
    present = {name: info for name, info in names.items() if name not in removed}
    evaluates = _held_out(present, splits, seed)
    supervised = _supervised(present, evaluates, splits, seed)
    training = {name for name in present if name not in evaluates}
    removed |= _remove_shared_sources(present, training, set(evaluates), splits)
    training -= removed.keys()
    forbidden = sorted(name for name in training if present[name].evaluation_only)
    if forbidden:
        raise ValueError(
            f"{forbidden[0]} is for evaluation only and would be trained on: hold it or its category "
            f"({present[forbidden[0]].category}) out, or exclude it"
        )
    trained = {present[name].category for name in training}
    roles = {}
    for name, info in present.items():
        if name in evaluates:
            roles[name] = Role(False, (evaluates[name],), 2 if info.category in trained else 1)
        elif name in training:
            held = supervised.get(name, ())
            roles[name] = Role(True, held, 3 if held else None)
    _require_levels(roles, present, splits)
    return Plan(roles, removed)


def destination(info: TaskInfo, role: Role, example: Example, splits: Splits, seed: int) -> str | None:
    """The split an example goes to, or None if it is left out.

    A published test or validation set is never trained on. All records of one raw example go to the same split.
    """
    split = example.split
    if role.level in (1, 2):
        wanted = role.evaluates[0]
        chosen = next((name for name in _NEAREST[wanted] if name in info.splits), None)
        return wanted if split == chosen or (info.first_are_test and split == "all") else None
    if role.level is None:
        return "train" if split in ("train", "all") or info.first_are_test else None  # first_are_test: all of them
    if split in role.evaluates:
        return split
    if split not in ("train", "all"):
        return None
    group = example.record.example.partition("/")[0]
    drawn = [name for name in role.evaluates if name not in info.splits]
    place = int.from_bytes(_digest(f"{seed}/instances/{info.data_source}/{group}"), "big") / 2.0**64
    number = int(place / splits.instance_fraction) if splits.instance_fraction else len(drawn)
    return drawn[number] if number < len(drawn) else "train"


def _held_out(present: dict[str, TaskInfo], splits: Splits, seed: int) -> dict[str, str]:
    """The evaluated tasks of levels 1 and 2, with their split."""
    evaluates: dict[str, str] = {}
    taken: set[str] = set()
    categories = {info.category for info in present.values()}
    for split, wanted in splits.held_out_categories.items():
        chosen = _choose(categories - taken, wanted, f"{seed}/categories/{split}", "held_out_categories", categories)
        taken |= chosen
        evaluates |= {name: split for name, info in present.items() if info.category in chosen}
    for split, wanted in splits.held_out_tasks.items():
        left = present.keys() - evaluates.keys()
        counts: dict[str, int] = {}
        for name in left:
            counts[present[name].category] = counts.get(present[name].category, 0) + 1
        # tasks drawn by number come from categories that keep another one to train on
        pool = left if isinstance(wanted, list) else {name for name in left if counts[present[name].category] > 1}
        chosen = _choose(pool, wanted, f"{seed}/tasks/{split}", "held_out_tasks", set(present))
        evaluates |= dict.fromkeys(chosen, split)
    return evaluates


def _supervised(
    present: dict[str, TaskInfo], evaluates: dict[str, str], splits: Splits, seed: int
) -> dict[str, tuple[str, ...]]:
    """The tasks of level 3, with the splits that evaluate them."""
    supervised: dict[str, tuple[str, ...]] = {}
    for split, wanted in splits.held_out_instances.items():
        pool = {name for name in present.keys() - evaluates.keys() if present[name].examples_known}
        if isinstance(wanted, list):
            blind = [name for name in wanted if name in present and not present[name].examples_known]
            if blind:
                raise ValueError(
                    f"splits.held_out_instances: {blind[0]} is already rendered, so the prompts of one raw example "
                    f"cannot be held out together; hold out the task instead"
                )
        chosen = _choose(pool, wanted, f"{seed}/instances/{split}", "held_out_instances", set(present))
        for name in chosen:
            supervised[name] = (*supervised.get(name, ()), split)
    return supervised


def _choose(pool: Iterable[str], wanted: list[str] | int, key: str, where: str, known: set[str]) -> set[str]:
    """The listed names, or the requested number of names drawn by the hash of `key` and name."""
    pool = set(pool)
    if isinstance(wanted, int):
        if wanted > len(pool):
            raise ValueError(f"splits.{where} draws {wanted}, but there are only {len(pool)}")
        return set(sorted(pool, key=lambda name: (_digest(f"{key}/{name}"), name))[:wanted])
    _require_known(wanted, known, where)
    for name in wanted:
        if name not in pool:
            raise ValueError(f"splits.{where}: {name!r} is held out already")
    return set(wanted)


def _require_known(wanted: Iterable[str], known: Iterable[str], where: str) -> None:
    known = set(known)
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3)
            hint = f"; near are: {', '.join(near)}" if near else ""
            raise ValueError(f"splits.{where}: there is no {name!r}{hint}")


def _remove_shared_sources(
    present: dict[str, TaskInfo], training: set[str], evaluated: set[str], splits: Splits
) -> dict[str, str]:
    """The training tasks that share a data source with an evaluated task; an error unless they are to be dropped."""
    evaluated_by = {present[name].data_source: name for name in sorted(evaluated, reverse=True)}
    shared = {
        name: evaluated_by[source] for name in sorted(training) if (source := present[name].data_source) in evaluated_by
    }
    if shared and splits.on_shared_source == "stop":
        pairs = "; ".join(f"{train} and {other} ({present[train].data_source})" for train, other in shared.items())
        raise ValueError(
            f"training and held-out tasks share a data source: {pairs}. Exclude one of each pair (splits.exclude), "
            f"hold both out, or set splits.on_shared_source=drop_train"
        )
    return {
        name: f"shares the data source {present[name].data_source} with {other}, which is held out"
        for name, other in shared.items()
    }


def _require_levels(roles: dict[str, Role], present: dict[str, TaskInfo], splits: Splits) -> None:
    """A task held out by name must be of level 2: otherwise its category should be held out by name."""
    for split, wanted in splits.held_out_tasks.items():
        for name in wanted if isinstance(wanted, list) else ():
            if roles[name].level == 1:
                raise ValueError(
                    f"splits.held_out_tasks.{split}: without {name}, no task of category {present[name].category!r} "
                    f"is left for training; hold the category out instead"
                )


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
