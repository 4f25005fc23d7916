"""The definition of a benchmark, read from one YAML file: sources with their tasks, splits, limits."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe.instruct.yaml_files import read_yaml

FOLDER = Path(__file__).parents[1] / "configs" / "instruct"
TASK_CAP = 100_000  # training records per task, also for FLAN (Iyer et al. 2022)
FLAN_TASK_CAP = 30_000


@dataclass(frozen=True)
class TaskSettings:
    """A definition's settings for one task. Which fields are needed depends on the reader."""

    category: str | None = None  # a cluster of the category table
    data_source: str | None = None  # the raw data behind the task; default: the task's name
    instruction: str | None = None  # the definition (task style) or a single sentence (keyword style)
    files: dict[str, str] = field(
        default_factory=dict
    )  # published split ("train", "validation", "test", "all") -> file
    fields: dict[str, str] = field(default_factory=dict)  # name used in templates -> expression over the raw row
    where: str | None = None  # expression over the raw row; rows for which it is false are left out
    template: str | None = None  # name of the template group; default: the task's name
    keep: str | None = None  # FLAN: the target that is not inverted, if templates of both directions are equally many
    evaluation_only: bool = False  # must never be trained on
    licence: str | None = None  # if it differs from the source's


@dataclass(frozen=True)
class Source:
    """One download in one published format."""

    reader: str
    benchmark: str
    licence: str
    path: str | None = None  # of the folder of tasks or templates, relative to the data folder
    tasks: dict[str, TaskSettings] = field(default_factory=dict)
    cap: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def task_cap(self) -> int:
        if self.cap is not None:
            return self.cap
        return FLAN_TASK_CAP if self.reader == "flan" else TASK_CAP


@dataclass(frozen=True)
class Overlap:
    """A pair above the threshold that was inspected and is kept."""

    train: str
    evaluation: str
    reason: str


@dataclass(frozen=True)
class Splits:
    """What is held out, by name or by a number to draw with the seed, and how leaks are handled."""

    held_out_categories: dict[str, Any] = field(
        default_factory=dict
    )  # {"validation": [names] or a number, "test": ...}
    held_out_tasks: dict[str, Any] = field(default_factory=dict)
    held_out_instances: dict[str, Any] = field(default_factory=dict)
    exclude: dict[str, str] = field(default_factory=dict)  # task -> reason for leaving it out
    instance_fraction: float = 0.05  # of a trained task's examples, for each split that evaluates it
    validation_records: int | None = 250  # per task (Iyer et al. 2022)
    test_records: int | None = None  # per task; None is every prompt of every example
    keep_partial_templates: tuple[str, ...] = ()  # evaluated tasks whose templates need not apply to every example
    on_shared_source: str = "stop"
    on_overlap: str = "stop"
    overlap_threshold: float = 0.01  # share of an evaluation task's examples
    allowed_overlaps: tuple[Overlap, ...] = ()


@dataclass(frozen=True)
class Definition:
    """A whole benchmark."""

    name: str
    sources: tuple[Source, ...]
    splits: Splits = field(default_factory=Splits)
    seed: int = 0


def find_definition(name: str) -> Path:
    """The file for a name in configs/instruct or a path. Raises ValueError listing the available names."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(f"{name} does not exist")
        return path
    path = FOLDER / f"{name}.yaml"
    if not path.is_file() or name == "categories":
        names = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "categories")
        raise ValueError(f"benchmark {name!r} is neither a .yaml file nor one of: {', '.join(names)}")
    return path


def load_definition(path: Path) -> Definition:
    """Read and check a definition. Raises ValueError naming the file, the key and the rule."""
    return parse_definition(read_yaml(path), str(path))


def parse_definition(plain: Any, where: str) -> Definition:
    """Check a definition read from YAML."""
    plain = dict(_mapping(plain, where))
    sources = plain.pop("sources", [])
    if not isinstance(sources, list) or not sources:
        raise ValueError(f"{where}: sources must be a list with at least one source")
    splits = dict(_mapping(plain.pop("splits", {}), f"{where}: splits"))
    allowed = splits.pop("allowed_overlaps", [])
    overlaps = [_build(Overlap, item, f"{where}: splits.allowed_overlaps[{i}]") for i, item in enumerate(allowed)]
    if isinstance(splits.get("keep_partial_templates"), list):
        splits["keep_partial_templates"] = tuple(splits["keep_partial_templates"])
    definition = _build(
        Definition,
        plain
        | {
            "sources": tuple(_source(item, f"{where}: sources[{i}]") for i, item in enumerate(sources)),
            "splits": _build(Splits, splits | {"allowed_overlaps": tuple(overlaps)}, f"{where}: splits"),
        },
        where,
    )
    _check_splits(definition.splits, where)
    return definition


def _source(plain: Any, where: str) -> Source:
    plain = dict(_mapping(plain, where))
    tasks = _mapping(plain.pop("tasks", {}), f"{where}: tasks")
    settings = {name: _build(TaskSettings, item or {}, f"{where}: tasks.{name}") for name, item in tasks.items()}
    source = _build(Source, plain | {"tasks": settings}, where)
    if source.cap is not None and source.cap < 1:
        raise ValueError(f"{where}: cap ({source.cap}) must be above 0")
    return source


def _check_splits(splits: Splits, where: str) -> None:
    for key, choices in (
        ("on_shared_source", ("stop", "drop_train")),
        ("on_overlap", ("stop", "drop_train", "report")),
    ):
        if getattr(splits, key) not in choices:
            raise ValueError(f"{where}: splits.{key} ({getattr(splits, key)!r}) must be one of: {', '.join(choices)}")
    for key in ("overlap_threshold", "instance_fraction"):
        if not 0.0 <= getattr(splits, key) < 0.5:
            raise ValueError(f"{where}: splits.{key} ({getattr(splits, key)}) must be at least 0 and below 0.5")
    for key in ("validation_records", "test_records"):
        if getattr(splits, key) is not None and getattr(splits, key) < 1:
            raise ValueError(f"{where}: splits.{key} ({getattr(splits, key)}) must be above 0, or null for all")
    for key in ("held_out_categories", "held_out_tasks", "held_out_instances"):
        _check_held_out(getattr(splits, key), f"{where}: splits.{key}")


def _check_held_out(wanted: dict[str, Any], where: str) -> None:
    for split, value in wanted.items():
        if split not in ("validation", "test"):
            raise ValueError(f"{where} has {split!r}; data is held out for validation or test only")
        names = isinstance(value, list) and all(isinstance(name, str) for name in value)
        if not names and not (type(value) is int and value >= 0):
            raise ValueError(f"{where}.{split} ({value!r}) must be a list of names or a number to draw")


def _build(kind: Any, plain: Any, where: str) -> Any:
    plain = _mapping(plain, where)
    known = {item.name: item for item in dataclasses.fields(kind)}
    for key, value in plain.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(known)}"
            raise ValueError(f"{where}: there is no key {key!r}; {hint}")
        _check_type(value, str(known[key].type), f"{where}: {key}")
    missing = [
        name
        for name, item in known.items()
        if name not in plain and item.default is item.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: {missing[0]} must be given")
    return kind(**plain)


_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,)}


def _check_type(value: Any, annotation: str, where: str) -> None:
    """Refuse values of the wrong type, such as a number instead of text; YAML makes `no` a bool and 1 a number."""
    names = [name.strip() for name in annotation.split(" | ")]
    if value is None and "None" in names:
        return
    expected = _TYPES.get(names[0])
    if expected is not None and (not isinstance(value, expected) or (isinstance(value, bool) and names[0] != "bool")):
        raise ValueError(f"{where} ({value!r}) must be {names[0]}")
    if names[0].startswith("dict"):
        _mapping(value, where)
    if names[0] == "dict[str, str]" and not all(isinstance(item, str) for item in value.values()):
        raise ValueError(f"{where} ({value!r}) must map names to text")


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{where} ({value!r}) must be a mapping with names as keys")
    return value
