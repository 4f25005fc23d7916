"""Evaluation of instruction-tuned models: ranked and written answers, their scores, and reports on several models."""

from __future__ import annotations

from moe.instruct.evaluation.aggregation import Leaf, SameTask, Series, aggregate
from moe.instruct.evaluation.comparison import compare, parse_source
from moe.instruct.evaluation.presets import PROTOCOLS, Protocol, find_protocol
from moe.instruct.evaluation.report import write_report
from moe.instruct.evaluation.runner import Evaluated, EvaluationSettings, evaluate_tasks
from moe.instruct.evaluation.tasks import EvaluationTask, benchmark_tasks, read_bbh, read_mmlu

__all__ = [
    "PROTOCOLS",
    "Evaluated",
    "EvaluationSettings",
    "EvaluationTask",
    "Leaf",
    "Protocol",
    "SameTask",
    "Series",
    "aggregate",
    "benchmark_tasks",
    "compare",
    "evaluate_tasks",
    "find_protocol",
    "parse_source",
    "read_bbh",
    "read_mmlu",
    "write_report",
]
