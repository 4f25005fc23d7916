"""The papers' own evaluation protocols, `artetxe2021` and `xglm`: prompts, scoring rules, demonstrations and runs.

    setting = Setting("xglm", "xcopa", language="sw", template_language="en", demo_language="en", num_shots=4)
    prepared = prepare_task(setting, lambda *where: read(*where, data_dir))
    result = run_task(model, tokenizer, prepared)
    result.accuracy, result.interval_over_demonstrations

Results differ from lm-eval's on the same data, since prompts and scoring differ (docs/evaluation_protocols.md).
"""

from moe.evaluation.protocols.results import RunResult, TaskResult
from moe.evaluation.protocols.runner import PreparedTask, Reader, Setting, prepare_task, run_task
from moe.evaluation.protocols.tasks import PROTOCOLS, find_task

__all__ = [
    "PROTOCOLS",
    "PreparedTask",
    "Reader",
    "RunResult",
    "Setting",
    "TaskResult",
    "find_task",
    "prepare_task",
    "run_task",
]
