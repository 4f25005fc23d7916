"""Checkpoints that need nothing but their path: tensors, configuration, tokenizer and counters in one folder.

    checkpoints/step_00000100/  *.safetensors (torch's distributed checkpoint, tensors only), config.yaml,
                                the tokenizer's own files, state.json, checksums.json
    checkpoints/latest          the name of the newest complete one, for scripts

A folder is written under another name, read back, checksummed and only then renamed, so that a folder named
step_* is complete no matter when the writer died. No pickle is written or read.

Any number of ranks can write one, each its own part, and any other number can read it: each file says which parts of
which tensors it has (`moe convert` merges them). All ranks must see the folder.
"""

from moe.checkpoint.consolidation import consolidate
from moe.checkpoint.divergence import DivergedError
from moe.checkpoint.folders import find_checkpoint, list_checkpoints, verify_checkpoint
from moe.checkpoint.function import function_changes
from moe.checkpoint.load import load_checkpoint, load_config, load_model, load_tokenizer, load_weights
from moe.checkpoint.save import CheckpointSaver, save_checkpoint
from moe.checkpoint.state import TrainState, model_tensors, optimizer_tensors

__all__ = [
    "CheckpointSaver",
    "DivergedError",
    "TrainState",
    "consolidate",
    "find_checkpoint",
    "function_changes",
    "list_checkpoints",
    "load_checkpoint",
    "load_config",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "model_tensors",
    "optimizer_tensors",
    "save_checkpoint",
    "verify_checkpoint",
]
