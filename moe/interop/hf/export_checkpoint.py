"""Exports one of our checkpoints to a folder that transformers opens without our code."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.checkpoint import find_checkpoint, load_config, load_tokenizer, verify_checkpoint
from moe.checkpoint.folders import sha256
from moe.config import ModelConfig
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer
from moe.data.tokenizer import tokenizer_files
from moe.generation import find_end_ids
from moe.interop.hf.families import Family, choose_family
from moe.interop.hf.folders import ORIGIN, carry_texts, dtype_of, new_folder
from moe.interop.hf.keys import CONFIG_FILE
from moe.interop.hf.our_weights import OurWeights
from moe.interop.hf.slots import Part, Slot
from moe.interop.hf.verification import verify_export
from moe.interop.hf.weights import SAFETENSORS, Weights
from moe.interop.hf.writing import Content, write_safetensors

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def to_hf(
    source: Path | str,
    destination: Path | str,
    *,
    family: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    verify: bool = False,
) -> Path:
    """Write the checkpoint found at `source` for transformers.AutoModelForCausalLM. Returns `destination`.

    family: one of FAMILIES; `None` is the one it was imported from, else the first that can express the model. dtype:
    as in from_hf. max_shard_size: per file, unless a single tensor is larger. verify: re-read both and compare. The
    exported function is the one of evaluation: training's capacities, losses and noise have no place in the format.
    Raises ValueError with the reasons if no family fits, for a damaged checkpoint, and if `destination` is not empty.
    """
    limit, wanted, destination = parse_size(max_shard_size), dtype_of(dtype), Path(destination)
    checkpoint = find_checkpoint(Path(source))
    verify_checkpoint(checkpoint)
    model = load_config(checkpoint).model
    origin = _origin(checkpoint)
    chosen = choose_family(model, family, origin.get("model_type"))
    slots = [alternatives[0] for alternatives in chosen.slots(model)]
    ours = OurWeights(checkpoint)
    ours.require(slots)
    with new_folder(destination) as folder:
        main = _write_shards(folder, destination, slots, ours, wanted, limit)
        config = _config(chosen, model, main, _token_ids(checkpoint, origin, chosen))
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if carry_texts(checkpoint, folder) == [SentencePieceTokenizer.FILE]:
            _describe_tokenizer(folder)
        if verify:
            theirs = Weights(folder, prefix=chosen.prefix, buffers=chosen.buffers)
            verify_export(slots, theirs, OurWeights(checkpoint))
    return destination


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "1GiB" or a plain number. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS or int(match[1]) == 0:
        raise ValueError(f"--max-shard-size ({text!r}) must be a size such as 5GB, 500MB or 1GiB")
    return int(match[1]) * _UNITS[match[2].upper()]


def _write_shards(
    folder: Path, destination: Path, slots: list[Slot], ours: OurWeights, wanted: torch.dtype | None, limit: int
) -> torch.dtype:
    """Write all tensors in as many files as `limit` requires, with an index if several; return the model's dtype."""
    places: dict[str, tuple[Slot, Part]] = {part.theirs: (slot, part) for slot in slots for part in slot.parts}
    contents = {}
    for name, (slot, part) in places.items():
        keeps = slot.ours.endswith("expert_bias")  # as in from_hf
        dtype = ours.dtype(slot.ours) if wanted is None or keeps else wanted
        contents[name] = Content(dtype, part.shape)

    def rows_of(name: str) -> Iterator[Tensor]:
        slot, part = places[name]
        yield part.rows(ours.rows(slot.ours, part.begin, part.end))

    shards = _plan(contents, limit)
    files = [SAFETENSORS]
    if len(shards) > 1:
        files = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
        index = {
            "metadata": {"total_size": sum(content.num_bytes for content in contents.values())},
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / f"{SAFETENSORS}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for file, shard in zip(files, shards, strict=True):
        written = write_safetensors(folder / file, shard, rows_of)
        if sha256(folder / file) != written:
            raise OSError(f"{destination / file} read back differs from what was written; try another disk")
    return contents[next(iter(contents))].dtype


def _plan(contents: dict[str, Content], limit: int) -> list[dict[str, Content]]:
    """Group the tensors into files of at most `limit` bytes, in the model's order."""
    shards: list[dict[str, Content]] = [{}]
    size = 0
    for name, content in contents.items():
        if shards[-1] and size + content.num_bytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = content
        size += content.num_bytes
    return shards


def _config(family: Family, model: ModelConfig, dtype: torch.dtype, ids: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **family.write(model),
        **ids,
    }


def _describe_tokenizer(folder: Path) -> None:
    """Write settings for our sentencepiece model; without them AutoTokenizer would treat it as the family's own.

    XGLM's has other ids, and GPT-2's, which OPT shares, other pieces. Models that change text are left unchanged.
    """
    tokenizer = SentencePieceTokenizer.load(folder / SentencePieceTokenizer.FILE)
    if not tokenizer.lossless:
        return
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # built from the model as it is
        "eos_token": tokenizer.piece(tokenizer.eos_id),
        "unk_token": tokenizer.piece(tokenizer.unk_id),
        "add_bos_token": False,
    }
    if tokenizer.bos_id is not None:
        settings["bos_token"] = tokenizer.piece(tokenizer.bos_id)
    (folder / SentencePieceTokenizer.SETTINGS).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _origin(checkpoint: Path) -> dict[str, Any]:
    """The config.json the checkpoint was imported with, if any."""
    file = checkpoint / ORIGIN
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _token_ids(checkpoint: Path, origin: dict[str, Any], family: Family) -> dict[str, Any]:
    """The ids used by generation: the imported ones, else the tokenizer's. Padding does not concern the model."""
    if origin.get("model_type") == family.model_type:
        return {name: origin[name] for name in (*_TOKEN_IDS, "decoder_start_token_id") if name in origin}
    ids: dict[str, Any] = dict.fromkeys(_TOKEN_IDS)
    if tokenizer_files(checkpoint):
        tokenizer = load_tokenizer(checkpoint)
        ends = find_end_ids(checkpoint, tokenizer)
        ids |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id if len(ends) == 1 else [*ends]}
    return ids
