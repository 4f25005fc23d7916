"""From a definition and a data folder to a benchmark: read, split, cap, filter, freeze.

Tasks are streamed; only the records that a task's cap keeps and, for the overlap filter, the 13-grams of the evaluation
text are in memory. The folder is written under a temporary name and renamed, so one with its final name is complete.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from moe.instruct.benchmark import FORMAT, SPLITS, Benchmark, TaskEntry, file_sha256, write_manifest
from moe.instruct.caps import Sample
from moe.instruct.catalogue import write_catalogue
from moe.instruct.categories import Categories
from moe.instruct.contamination import EvaluationCoverage, Overlap, OverlapFilter
from moe.instruct.definition import Definition
from moe.instruct.readers import READERS
from moe.instruct.readers.tasks import Context, Skipped, TaskInfo, TaskReader
from moe.instruct.records import fault, read_records, write_records
from moe.instruct.splits import EVALUATED, Plan, Role, destination, plan_splits


class Found(NamedTuple):
    """All tasks of a definition and the files they come from."""

    readers: list[TaskReader]
    inputs: set[Path]


def find_tasks(definition: Definition, data: Path, categories: Categories) -> Found:
    """List the tasks of all sources without reading examples. Raises ValueError naming source, task and key."""
    readers: dict[str, TaskReader] = {}
    inputs: set[Path] = set()
    for number, source in enumerate(definition.sources):
        where = f"sources[{number}] ({source.benchmark})"
        if source.reader not in READERS:
            raise ValueError(f"{where}: reader {source.reader!r} must be one of: {', '.join(READERS)}")
        context = Context(source, data, categories, definition.seed, where)
        count = len(readers)
        for reader in READERS[source.reader](context):
            if reader.info.name in readers:
                raise ValueError(f"{where}: there are two tasks named {reader.info.name}; rename one")
            readers[reader.info.name] = reader
        if len(readers) == count:
            raise ValueError(f"{where}: the source gives no task; name its tasks under `tasks`")
        inputs |= context.inputs
    return Found([readers[name] for name in sorted(readers)], inputs)


def build(
    definition: Definition, data: Path, out: Path, *, categories: Categories | None = None, strict: bool = False
) -> Benchmark:
    """Build the benchmark of `definition` from the files under `data` into the new folder `out`.

    An example that yields no record (a template fails, an empty target) is skipped and counted, or an error with
    `strict`. Raises ValueError naming the file, task, template or pair at fault; if an overlap stops the build, its
    report is left in `<out>.overlaps.json`.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: a benchmark is frozen; choose a new folder or delete it")
    found = find_tasks(definition, Path(data), categories or Categories.load())
    plan = plan_splits([reader.info for reader in found.readers], definition.splits, definition.seed)
    scratch = out.with_name(f".{out.name}.{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        scratch.mkdir(parents=True)
        work = _Build(definition, plan, scratch, strict)
        work.write_tasks([reader for reader in found.readers if reader.info.name in plan.roles])
        work.filter_overlaps(out.with_name(f"{out.name}.overlaps.json"))
        work.freeze(Path(data), found)
        write_catalogue(Benchmark(scratch, verify=False), scratch / "catalogue.html")
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    return Benchmark(out, verify=False)


@dataclass
class _Build:
    definition: Definition
    plan: Plan
    folder: Path
    strict: bool
    entries: dict[str, dict[str, TaskEntry]] = field(default_factory=lambda: {split: {} for split in SPLITS})
    templates: dict[str, dict[str, Any]] = field(default_factory=dict)
    removed: dict[str, str] = field(default_factory=dict)
    overlaps: dict[str, Any] = field(default_factory=dict)

    def write_tasks(self, readers: list[TaskReader]) -> None:
        """Stream every task into its splits' files."""
        self.removed = dict(self.plan.removed)
        for reader in tqdm(readers, desc="tasks", unit="task", file=sys.stderr, disable=None):
            self._write_task(reader, self.plan.roles[reader.info.name])

    def _write_task(self, reader: TaskReader, role: Role) -> None:
        info, splits, seed = reader.info, self.definition.splits, self.definition.seed
        wanted = (*(("train",) if role.trains else ()), *role.evaluates)
        limits = {"train": info.cap, "validation": splits.validation_records, "test": splits.test_records}
        # one prompted version per example on average: room for as many as the cap, regardless of the templates
        samples = {split: Sample(limits[split], seed, by_template=split in EVALUATED) for split in wanted}
        skipped: dict[str, Counter[str]] = {split: Counter() for split in wanted}
        partial: set[str] = set()
        for item in reader.read():
            if isinstance(item, Skipped):
                self._skip(info, item, skipped)
                partial |= {item.template} if item.template and not item.failed else set()
                continue
            split = destination(info, role, item, splits, seed)
            if split is None:
                continue
            problem = fault(item.record)
            if problem is None:
                samples[split].add(item.record)
            else:
                where = f"example {item.record.example}: {item.record.body[:80]!r}"
                self._skip(info, Skipped(item.record.template, where, problem, True, split), skipped)
        # a template that does not apply to every example would evaluate only some of them (Iyer et al. 2022)
        if not role.evaluates or info.name in splits.keep_partial_templates:
            partial = set()
        self.templates[info.name] = {"dropped": list(info.dropped_templates), "partial": sorted(partial)}
        for split in wanted:
            without = partial if split in EVALUATED else set()
            self._write_split(info, role, split, samples[split], skipped[split], without)

    def _skip(self, info: TaskInfo, item: Skipped, skipped: dict[str, Counter[str]]) -> None:
        template = f", template {item.template!r}" if item.template else ""
        if item.failed and self.strict:
            raise ValueError(f"task {info.name}{template}, {item.where}: {item.reason}")
        key = f"{item.template}: {item.reason}" if item.template else item.reason
        counter = skipped[item.split if item.split in skipped else next(iter(skipped))]
        counter[key[:200] if key[:200] in counter or len(counter) < 20 else "other reasons"] += 1

    def _write_split(
        self, info: TaskInfo, role: Role, split: str, sample: Sample, skipped: Counter[str], without: set[str]
    ) -> None:
        # the pool has all prompted versions, of which as many are drawn as there are examples (Iyer et al. 2022)
        records = sample.drawn(min(sample.examples, info.cap) if split == "train" else None, without)
        if not records:
            reasons = "; ".join(f"{reason} ({count})" for reason, count in skipped.most_common(3)) or "it has none"
            raise ValueError(f"task {info.name} gives no record for {split}: {reasons}. Exclude it (splits.exclude)")
        file = f"{split}/{info.name}.jsonl"
        path = self.folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        count = write_records(path, records)
        self.entries[split][info.name] = TaskEntry(
            task=info.name,
            benchmark=info.benchmark,
            category=info.category,
            data_source=info.data_source,
            style=info.style,
            licence=info.licence,
            level=None if split == "train" else role.level,
            file=file,
            records=count,
            examples=len({record.example or str(i) for i, record in enumerate(records)}),
            seen=sample.seen(without),
            sha256=file_sha256(path),
            skipped=dict(skipped),
        )

    def filter_overlaps(self, report: Path) -> None:
        """Compare every training task with every evaluation task and handle leaking pairs as the definition says.

        With on_overlap="stop" raises ValueError naming the pairs, after writing the report to the file `report`.
        """
        splits = self.definition.splits
        evaluation = [
            (f"{split}/{name}", read_records(self.folder / entry.file))
            for split in EVALUATED
            for name, entry in self.entries[split].items()
        ]
        filter_ = OverlapFilter(evaluation)
        pairs: list[Overlap] = []
        for name, entry in tqdm(self.entries["train"].items(), desc="overlaps", unit="task", disable=None):
            pairs += filter_.overlaps(name, read_records(self.folder / entry.file))
        allowed = {(item.train, item.evaluation): item.reason for item in splits.allowed_overlaps}
        self._require_allowed_exist(allowed)
        above = [pair for pair in pairs if pair.share > splits.overlap_threshold]
        leaks = [pair for pair in above if not self._is_allowed(pair, allowed)]
        self.overlaps = _report(above, pairs, filter_.coverage, allowed, splits.overlap_threshold)
        write_manifest(self.folder / "overlaps.json", self.overlaps)
        if leaks and splits.on_overlap == "stop":
            shutil.copyfile(self.folder / "overlaps.json", report)
            raise ValueError(_leak_message(leaks, splits.overlap_threshold, report))
        if splits.on_overlap == "drop_train":
            self._drop_training(leaks)

    def _require_allowed_exist(self, allowed: Iterable[tuple[str, str]]) -> None:
        evaluated = self.entries["validation"].keys() | self.entries["test"].keys()
        for train, evaluation in allowed:
            if train not in self.entries["train"] or evaluation not in evaluated:
                raise ValueError(
                    f"splits.allowed_overlaps: no pair of {train} in training and {evaluation} in evaluation"
                )

    def _is_allowed(self, pair: Overlap, allowed: dict[tuple[str, str], str]) -> bool:
        """Also allows a task's overlap with itself: its examples may share passages, which is what level 3 measures."""
        evaluation = pair.evaluation.split("/", 1)[1]
        return pair.train == evaluation or (pair.train, evaluation) in allowed

    def _drop_training(self, leaks: list[Overlap]) -> None:
        for pair in sorted(leaks, key=lambda pair: pair.share):  # the reason kept is the one with the largest share
            entry = self.entries["train"].pop(pair.train, None)
            if entry is not None:
                (self.folder / entry.file).unlink()
            self.removed[pair.train] = f"{100 * pair.share:.1f} % of {pair.evaluation} is inside it"
        trained = {entry.category for entry in self.entries["train"].values()}
        for split in EVALUATED:
            for name, entry in list(self.entries[split].items()):
                level = entry.level
                if level == 3 and name not in self.entries["train"]:
                    level = 2
                if level == 2 and entry.category not in trained:
                    level = 1
                self.entries[split][name] = entry._replace(level=level)

    def freeze(self, data: Path, found: Found) -> None:
        """Write the manifests; nothing changes afterwards."""
        splits = {}
        for split in SPLITS:
            tasks = [self.entries[split][name] for name in sorted(self.entries[split])]
            (self.folder / split).mkdir(exist_ok=True)
            digest = write_manifest(
                self.folder / split / "manifest.json", {"tasks": [task._asdict() for task in tasks]}
            )
            splits[split] = {
                "sha256": digest,
                "tasks": len(tasks),
                "categories": len({task.category for task in tasks}),
                "records": sum(task.records for task in tasks),
            }
        evaluated = [entry for split in EVALUATED for entry in self.entries[split].values()]
        write_manifest(
            self.folder / "manifest.json",
            {
                "format": FORMAT,
                "name": self.definition.name,
                "seed": self.definition.seed,
                "splits": splits,
                "held_out_categories": sorted({entry.category for entry in evaluated if entry.level == 1}),
                "removed": self.removed,
                "templates": {name: value for name, value in self.templates.items() if any(value.values())},
                "licences": _licences(self.entries),
                "inputs": {_relative(path, data): file_sha256(path) for path in sorted(found.inputs)},
                "overlaps_above_threshold": len(self.overlaps["pairs"]),
            },
        )


def _report(
    above: list[Overlap],
    pairs: list[Overlap],
    coverage: dict[str, EvaluationCoverage],
    allowed: dict[tuple[str, str], str],
    threshold: float,
) -> dict[str, Any]:
    """The content of overlaps.json: every pair above the threshold, and what the filter could not see."""
    listed = [
        pair._asdict()
        | {"share": round(pair.share, 6), "allowed": allowed.get((pair.train, pair.evaluation.split("/", 1)[1]), "")}
        for pair in sorted(above, key=lambda pair: (-pair.share, pair.train))
    ]
    return {
        "threshold": threshold,
        "pairs_with_any_overlap": len(pairs),
        "pairs": listed,
        "evaluation": {name: item._asdict() for name, item in coverage.items()},
    }


def _leak_message(leaks: list[Overlap], threshold: float, report: Path) -> str:
    shown = sorted(leaks, key=lambda pair: -pair.share)[:10]
    lines = [
        f"  {100 * pair.share:.1f}% of {pair.evaluation} ({pair.examples} of {pair.of}) is inside {pair.train}: "
        f'"{pair.words[:90]}"'
        for pair in shown
    ]
    more = f"\n  and {len(leaks) - len(shown)} more" if len(leaks) > len(shown) else ""
    return (
        f"evaluation data leaks into training: {len(leaks)} pairs share 13 words in a row in more than "
        f"{100 * threshold:g}% of the evaluation examples\n"
        + "\n".join(lines)
        + more
        + f"\nAll pairs are in {report}. Exclude one task of each pair "
        f"(splits.exclude), state why it may stay (splits.allowed_overlaps), or set splits.on_overlap=drop_train"
    )


def _licences(entries: dict[str, dict[str, TaskEntry]]) -> dict[str, list[str]]:
    tasks: dict[str, set[str]] = {}
    for by_name in entries.values():
        for entry in by_name.values():
            tasks.setdefault(entry.licence, set()).add(entry.task)
    return {licence: sorted(names) for licence, names in sorted(tasks.items())}


def _relative(path: Path, data: Path) -> str:
    return str(path.relative_to(data)) if path.is_relative_to(data) else str(path)
