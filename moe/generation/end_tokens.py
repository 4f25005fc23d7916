"""Which tokens end a generated text: the tokenizer's own, and those that an imported checkpoint names."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from moe.checkpoint import find_checkpoint
from moe.data.tokenizer import Tokenizer

# Of a checkpoint in Hugging Face's format, as `moe convert from-hf` carries them; the first that names ids decides
NAMING_ENDS = ("generation_config.json", "hf_config.json")

EosId = int | Collection[int] | None  # one, several, or none at all


def find_end_ids(path: Path | str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that end a text of the checkpoint at `path`, in order: `tokenizer.eos_id` and the imported ones.

    Like transformers, takes generation_config.json before config.json. The tokenizer's own always counts: what
    follows it is another document. Raises ValueError for a file that is not JSON or ids that are not whole numbers.
    """
    folder = find_checkpoint(Path(path))
    for name in NAMING_ENDS:
        if (folder / name).is_file() and (named := named_end_ids(folder / name)):
            return tuple(sorted({tokenizer.eos_id, *named}))
    return (tokenizer.eos_id,)


def named_end_ids(file: Path) -> tuple[int, ...]:
    """`eos_token_id` of a JSON file: one number, a list, or null or nothing for none. Raises ValueError otherwise."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object")
    value = content.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(each) is int for each in ids):
        raise ValueError(f"{file}: eos_token_id ({value!r}) must be a token id, a list of them, or null for none")
    return tuple(ids)


def as_set(eos_id: EosId) -> frozenset[int]:
    """The ids as a set; empty if there are none."""
    if eos_id is None:
        return frozenset()
    return frozenset((eos_id,) if isinstance(eos_id, int) else eos_id)
