"""Instruction tuning (OPT-IML): one benchmark made of many collections, with leak-free splits."""

from __future__ import annotations

from moe.instruct.benchmark import Benchmark, TaskEntry
from moe.instruct.build import build
from moe.instruct.categories import Categories
from moe.instruct.definition import Definition, find_definition, load_definition
from moe.instruct.records import Record, read_records, write_records

__all__ = [
    "Benchmark",
    "Categories",
    "Definition",
    "Record",
    "TaskEntry",
    "build",
    "find_definition",
    "load_definition",
    "read_records",
    "write_records",
]
