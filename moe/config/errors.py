"""Errors in the user's words."""

from __future__ import annotations

import re


def plainer(text: str) -> str:
    """OmegaConf's message for a wrong value, reworded to say what to write instead."""
    text = re.sub(r"field '.*' is not Optional", "it needs a value, and null is none", text)
    text = re.sub(r"\w+ \(DictConfig\) does not support deletion", "no key can be left out; set it instead", text)
    text = re.sub(r"(Value '(\d+)\.0' of .* Integer)", r"\1; write \2", text)
    text = re.sub(r"Invalid value assigned: (\w+) is not a ListConfig.*", r"it takes a list, [A,B], not one \1", text)
    return re.sub(r"Invalid type assigned: \w+ is not .*", "it is a part with fields of its own; set those", text)


def in_words(error: ValueError | OSError) -> str:
    """The message; for a system error the file and the reason, without the error number."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)
