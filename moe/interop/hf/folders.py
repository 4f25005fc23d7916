"""What both directions share: atomic folders, the text files carried along, dtypes by name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from moe.checkpoint.folders import flush_to_disk
from moe.data.tokenizer import tokenizer_files
from moe.generation.end_tokens import NAMING_ENDS

GENERATION_FILE, ORIGIN = NAMING_ENDS  # the second: the config.json that one of our checkpoints was imported with
# in addition to the tokenizer's own files
CARRIED = (GENERATION_FILE, "chat_template.jinja", "chat_template.json")
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yield a folder to write into; it becomes `destination` if the block succeeds and is deleted otherwise.

    Raises ValueError if `destination` is not empty, has no name (as `.`), or a file is in its way.
    """
    if not destination.name:
        raise ValueError(f"destination ({str(destination)!r}) must be a new folder, by its name")
    for path in (destination, *destination.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"{path} is a file: name a new folder")
    if destination.exists() and any(destination.iterdir()):
        raise ValueError(f"{destination} is not empty: name a new folder")
    partial = destination.with_name(f".partial_{destination.name}")
    shutil.rmtree(partial, ignore_errors=True)  # left by a crash
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            flush_to_disk(path)
        os.replace(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def carry_texts(source: Path, destination: Path) -> list[str]:
    """Copy the tokenizer's files and the generation settings, byte for byte. Returns their names."""
    names = tokenizer_files(source) + [name for name in CARRIED if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, destination / name)
    return names


def dtype_of(name: str | None) -> torch.dtype | None:
    """Raises ValueError for a name that is not one of DTYPES. None is None."""
    if name is None:
        return None
    if name not in DTYPES:
        raise ValueError(f"--dtype ({name!r}) must be one of: {', '.join(DTYPES)}")
    return DTYPES[name]
