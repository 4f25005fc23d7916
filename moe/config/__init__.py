"""Every setting of a run, with its checks. Standard library only, so that a laptop can plan without torch."""

from moe.config.checks import require_choice, require_fraction, require_not_negative, require_positive
from moe.config.data import DataConfig
from moe.config.evaluation import EvalConfig
from moe.config.model import ModelConfig, MoEConfig, RopeScalingConfig
from moe.config.run import RunConfig
from moe.config.training import OptimConfig, ParallelConfig, TrainConfig
from moe.config.tuning import SingleTaskConfig, TuneConfig

__all__ = [
    "DataConfig",
    "EvalConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "RopeScalingConfig",
    "RunConfig",
    "SingleTaskConfig",
    "TrainConfig",
    "TuneConfig",
    "require_choice",
    "require_fraction",
    "require_not_negative",
    "require_positive",
]
