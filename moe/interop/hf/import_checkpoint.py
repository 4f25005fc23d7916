"""Imports a published checkpoint as one of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe.checkpoint.consolidation import MODEL_FILE
from moe.checkpoint.folders import CHECKSUMS, sha256
from moe.compose import to_yaml
from moe.config import DataConfig, EvalConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from moe.data.tokenizer import open_tokenizer, tokenizer_files
from moe.generation.end_tokens import named_end_ids
from moe.interop.hf.families import Family, read_config
from moe.interop.hf.fitting import choose_layout, require_fit
from moe.interop.hf.folders import GENERATION_FILE, ORIGIN, carry_texts, dtype_of, new_folder
from moe.interop.hf.keys import CONFIG_FILE
from moe.interop.hf.our_weights import OurWeights
from moe.interop.hf.slots import Part, Slot
from moe.interop.hf.verification import verify_import
from moe.interop.hf.weights import Weights
from moe.interop.hf.writing import Content, write_safetensors

_LEARNING_RATE = 1e-4  # a configuration must have one; a run that starts from the weights sets its own


def from_hf(
    source: Path | str,
    destination: Path | str,
    *,
    dtype: str | None = None,
    verify: bool = False,
    without_tokenizer: bool = False,
) -> Path:
    """Write the published checkpoint in folder `source` as one of our checkpoint folders. Returns `destination`.

    dtype: "float32", "bfloat16", ...; `None` keeps each tensor's own. verify: re-read both and compare.
    without_tokenizer: accept a folder without one; the result then works with load_model and init_from, but not for
    text. Raises ValueError for a family or a key that cannot be expressed, for missing, unused, misshaped and damaged
    tensors, for a tokenizer whose ids exceed the embedding, for end tokens that are no ids, and if `destination` is not
    empty.
    """
    source, destination, wanted = Path(source), Path(destination), dtype_of(dtype)
    if not source.is_dir():
        raise ValueError(f"{source} is not a folder: give the one that holds config.json and the weights")
    family, model = read_config(source)
    _check_tokenizer(source, model, without_tokenizer)
    for name in (CONFIG_FILE, GENERATION_FILE):
        if (source / name).is_file():
            named_end_ids(source / name)  # raises for what generation could not use
    theirs = Weights(source, prefix=family.prefix, buffers=family.buffers)
    slots = choose_layout(family.slots(model), theirs)
    tied_to = _embedding(slots).theirs if model.tie_embeddings else None
    require_fit(slots, theirs, tied_to=tied_to)
    with new_folder(destination) as folder:
        written = _write_weights(folder / MODEL_FILE, slots, theirs, wanted)
        (folder / "config.yaml").write_text(to_yaml(_run_config(model, family)))
        shutil.copyfile(source / CONFIG_FILE, folder / ORIGIN)
        names = [MODEL_FILE, "config.yaml", ORIGIN, *carry_texts(source, folder)]
        checksums = {name: sha256(folder / name) for name in names}
        if checksums[MODEL_FILE] != written:
            raise OSError(f"{destination / MODEL_FILE} read back differs from what was written; try another disk")
        (folder / CHECKSUMS).write_text(json.dumps(checksums, indent=1))
        if verify:
            verify_import(slots, Weights(source, prefix=family.prefix, buffers=family.buffers), OurWeights(folder))
    return destination


def _write_weights(path: Path, slots: list[Slot], theirs: Weights, wanted: torch.dtype | None) -> str:
    by_name = {slot.ours: slot for slot in slots}

    def rows_of(name: str) -> Iterator[Tensor]:
        return (part.ours(theirs.read(part)) for part in by_name[name].parts)

    def dtype(slot: Slot) -> torch.dtype:
        found = theirs.entries[slot.parts[0].theirs].dtype
        assert isinstance(found, torch.dtype)  # ensured by require_fit
        keeps = slot.ours.endswith("expert_bias")  # the balancing bias is float32 whatever the weights' dtype
        return found if wanted is None or keeps else wanted

    return write_safetensors(path, {slot.ours: Content(dtype(slot), slot.shape) for slot in slots}, rows_of)


def _embedding(slots: list[Slot]) -> Part:
    return next(slot.parts[0] for slot in slots if slot.ours == "embedding.weight")


def _check_tokenizer(source: Path, model: ModelConfig, without_tokenizer: bool) -> None:
    """Check that the tokenizer opens and that each of its ids has an embedding."""
    names = tokenizer_files(source)
    if not names:
        if without_tokenizer:
            return
        raise ValueError(
            f"{source} holds no tokenizer: put its files (tokenizer.json, or sentencepiece's model) there, or take the "
            f"weights alone with --without-tokenizer"
        )
    size = open_tokenizer(source, allow_lossy=True).vocab_size
    assert model.vocab_size is not None
    if size > model.vocab_size:
        raise ValueError(
            f"{source}: the tokenizer ({', '.join(names)}) has {size} ids and the model vocab_size {model.vocab_size}: "
            f"the ids from {model.vocab_size} on would have no embedding. Use the tokenizer that belongs to the weights"
        )


def _run_config(model: ModelConfig, family: Family) -> RunConfig:
    """A complete configuration around the model's shape; later training sets the rest."""
    return RunConfig(
        model=model,
        data=DataConfig(name="python", text_format=family.text_format),
        optim=OptimConfig(lr=_LEARNING_RATE),
        train=TrainConfig(num_steps=1, batch_tokens=model.max_seq_len),
        eval=EvalConfig(),
    )
