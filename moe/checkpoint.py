"""Checkpoints that need nothing but their path: tensors, configuration, tokenizer and counters in one folder.

    checkpoints/step_00000100/  *.safetensors (torch's distributed checkpoint, tensors only), config.yaml,
                                tokenizer.model, state.json, checksums.json
    checkpoints/latest          the name of the newest complete one, for scripts

A folder is written under another name, read back, checksummed and only then renamed, so that a folder named
step_* is complete whenever the writer died. No pickle is written or read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from moe.compose import from_yaml
from moe.config import RunConfig
from moe.data.tokenizer import Tokenizer
from moe.model import Transformer

FILE_BYTES = 128 * 2**20  # of one file, unless a single tensor is larger
_STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass
class TrainState:
    """Where a run stands: all that is not a tensor. The data order follows from `step` alone."""

    step: int = 0
    tokens: int = 0
    flops: float = 0.0  # useful training FLOPs
    seconds: float = 0.0  # spent in steps
    skipped_steps: int = 0  # updates left out because loss or gradient was not finite
    skipped_in_a_row: int = 0


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under `model.<name>`; tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[f"model.{name}"] = tensor.detach()
    return tensors


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state under `optim.<parameter>.<key>`; empty before the first update."""
    return {
        f"optim.{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(
    folder: Path,
    *,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    state: TrainState,
    config_yaml: str,
    tokenizer: Tokenizer,
    keep: int,
) -> Path:
    """Write `folder`/step_<step>, make it the latest and delete all but the newest `keep`. Returns its path.

    optimizer: `None` writes weights alone, to start another run from.
    Raises ValueError when a tensor is not finite, OSError when the disk refuses; earlier checkpoints survive both.
    """
    tensors = model_tensors(model)
    if optimizer is not None:
        tensors |= optimizer_tensors(model, optimizer)
    _refuse_non_finite(tensors, state.step)
    final = folder / f"step_{state.step:08d}"
    partial = folder / f".partial_step_{state.step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # left by a crash
        partial.mkdir()
        _write_tensors(partial, tensors)
        (partial / "config.yaml").write_text(config_yaml)
        (partial / "state.json").write_text(json.dumps(asdict(state)))
        tokenizer.save(partial / "tokenizer.model")
        _compare_with_disk(partial, tensors)
        checksums = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / "checksums.json").write_text(json.dumps(checksums, indent=1))
        for path in partial.iterdir():
            _flush_to_disk(path)
        if final.exists():  # the same step again, after a resume from before it
            shutil.rmtree(final)
        os.replace(partial, final)
        _flush_to_disk(folder)
        _write_latest(folder, final.name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"checkpoint {final} could not be written ({error}); earlier checkpoints in {folder} are untouched. "
            f"Free space or choose another run_dir, then start the same command again"
        ) from error
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest in a run folder or a checkpoints folder."""
    if (path / "checksums.json").is_file():
        return path
    for folder in (path, path / "checkpoints"):
        if checkpoints := list_checkpoints(folder):
            return checkpoints[-1]
    raise ValueError(
        f"no checkpoint at {path}: give a run folder, its checkpoints folder or one step_* folder inside it"
    )


def verify_checkpoint(path: Path) -> None:
    """Raise ValueError naming the first file that is missing, truncated or changed since it was written."""
    for name, expected in json.loads((path / "checksums.json").read_text()).items():
        file = path / name
        found = _sha256(file) if file.is_file() else "no such file"
        if found != expected:
            others = [other.name for other in list_checkpoints(path.parent) if other != path]
            advice = f"delete {path} to resume from {others[-1]}" if others else f"delete {path} to start again"
            raise ValueError(f"{file} is damaged: sha256 {found}, expected {expected}; {advice}")


def load_checkpoint(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
    """Put a verified checkpoint into `model` and `optimizer`, in place, and return the counters."""
    verify_checkpoint(path)
    stored = _stored_shapes(path)
    tensors = model_tensors(model)
    _require_same_tensors(path, tensors, {key: shape for key, shape in stored.items() if key.startswith("model.")})
    for name, parameter in model.named_parameters():
        prefix = f"optim.{name}."
        for key in (key for key in stored if key.startswith(prefix) and "." not in key[len(prefix) :]):
            is_scalar = key.endswith(".step")
            value = torch.zeros((), dtype=torch.float32) if is_scalar else torch.empty_like(parameter)
            optimizer.state[parameter][key[len(prefix) :]] = value
    tensors |= optimizer_tensors(model, optimizer)
    _read_tensors(path, tensors)
    return TrainState(**json.loads((path / "state.json").read_text()))


def load_config(path: Path | str) -> RunConfig:
    """The configuration inside the checkpoint that `path` means."""
    return from_yaml((find_checkpoint(Path(path)) / "config.yaml").read_text())


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer inside the checkpoint that `path` means."""
    return Tokenizer.load(find_checkpoint(Path(path)) / "tokenizer.model")


def load_model(path: Path | str, *, device: torch.device | str = "cpu") -> Transformer:
    """The model of a run folder or checkpoint, in evaluation mode. Raises ValueError if it is damaged."""
    checkpoint = find_checkpoint(Path(path))
    verify_checkpoint(checkpoint)
    config = load_config(checkpoint)
    model = Transformer(config.model, backend=config.backend, device="meta").to_empty(device=device)
    _read_model(checkpoint, model)
    return model.eval()


def load_weights(path: Path | str, *, model: nn.Module) -> None:
    """Put the weights of a run folder or checkpoint into `model`, in place. Raises ValueError if they do not fit."""
    checkpoint = find_checkpoint(Path(path))
    verify_checkpoint(checkpoint)
    _read_model(checkpoint, model)


def _read_model(checkpoint: Path, model: nn.Module) -> None:
    tensors = model_tensors(model)
    stored = {key: shape for key, shape in _stored_shapes(checkpoint).items() if key.startswith("model.")}
    _require_same_tensors(checkpoint, tensors, stored)
    _read_tensors(checkpoint, tensors)


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    # given a non-tensor this writer produces a corrupt file without a word
    wrong = [key for key, value in tensors.items() if not isinstance(value, Tensor)]
    assert not wrong, f"only tensors can be saved, not {wrong}"
    with _one_process():
        dcp.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(
                str(folder), fqn_to_index_mapping=_files(tensors), save_distributed=True
            ),
            no_dist=True,
            use_collectives=False,
        )


def _files(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Which file, from 1, each tensor goes to: the writer holds a whole file in memory beside the tensors."""
    files, number, size = {}, 1, 0
    for key, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        files[key] = number
        size += tensor.nbytes
    return files


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    with _one_process():
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """torch warns that no process group is there; one process is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            shapes |= {key: tuple(content.get_slice(key).get_shape()) for key in content.keys()}  # noqa: SIM118
    return shapes


def _compare_with_disk(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Read every tensor back and compare it bit for bit with memory, one at a time."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as content:
            for key in content.keys():  # noqa: SIM118 - not a mapping
                if not torch.equal(content.get_tensor(key), tensors[key].cpu()):
                    raise OSError(f"{key} read back from {file} differs from what was written")


def _require_same_tensors(path: Path, model: dict[str, Tensor], stored: dict[str, tuple[int, ...]]) -> None:
    problems = [f"missing {key}" for key in model.keys() - stored.keys()]
    problems += [f"unused {key}" for key in stored.keys() - model.keys()]
    problems += [
        f"{key} is {stored[key]}, the model's is {tuple(model[key].shape)}"
        for key in model.keys() & stored.keys()
        if stored[key] != tuple(model[key].shape)
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:5])
        raise ValueError(f"{path} does not fit the model: {shown} ({len(problems)} differences)")


def _refuse_non_finite(tensors: dict[str, Tensor], step: int) -> None:
    # the infinity norm is the largest magnitude and passes a NaN on, without a mask the size of the tensor
    poisoned = [
        key for key, value in tensors.items() if not torch.linalg.vector_norm(value.float(), float("inf")).isfinite()
    ]
    if poisoned:
        raise ValueError(
            f"step {step} is not saved: {poisoned[0]} ({len(poisoned)} tensors in all) is not finite; "
            f"lower optim.lr or set optim.clip_norm and resume from the last checkpoint"
        )


def _write_latest(folder: Path, name: str) -> None:
    scratch = folder / ".latest.tmp"
    scratch.write_text(name + "\n")
    os.replace(scratch, folder / "latest")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
