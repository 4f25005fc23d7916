"""Strict reading of a config.json: every key is used, known to be irrelevant, or an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG_FILE = "config.json"
_REQUIRED = object()

# affects neither the function nor its training here: token ids belong to the tokenizer, the rest to their program
WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "model_type", "auto_map", "transformers_version", "torch_dtype", "dtype", "_name_or_path"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id", "prefix"),
        *("use_cache", "output_router_logits", "output_attentions", "output_hidden_states", "return_dict"),
        *("return_dict_in_generate", "task_specific_params", "is_decoder", "_from_model_config", "tokenizer_class"),
        *(
            "n_special",
            "predict_special_tokens",
            "output_past",
            "finetuning_task",
            "id2label",
            "label2id",
            "num_labels",
        ),
        # generation defaults, from before they had a file of their own
        *("do_sample", "max_length", "min_length", "max_new_tokens", "temperature", "top_k", "top_p", "num_beams"),
        *("repetition_penalty", "length_penalty", "early_stopping", "num_return_sequences"),
    }
)


class Keys:
    """The keys of one config.json, recording which were read."""

    def __init__(self, config: dict[str, Any], origin: Path) -> None:
        self.config = config
        self.origin = origin
        self._read: set[str] = set()

    @classmethod
    def open(cls, folder: Path) -> Keys:
        """Raises ValueError if config.json is missing or is not a JSON object."""
        file = folder / CONFIG_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no {CONFIG_FILE}: give the folder of a published checkpoint")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}") from error
        if not isinstance(config, dict):
            raise ValueError(f"{file} holds a {type(config).__name__}, not an object")
        return cls(config, file)

    def get(self, name: str, default: Any = _REQUIRED, *aliases: str) -> Any:
        """The value of `name` or else of an alias, or else the family's `default`."""
        names = (name, *aliases)
        self._read.update(names)
        given = [self.config[each] for each in names if each in self.config]
        if any(value != given[0] for value in given):
            raise ValueError(
                f"{self.origin}: {' and '.join(names)} are names of one value but differ: {given}; remove the wrong one"
            )
        if given:
            return given[0]
        if default is _REQUIRED:
            raise ValueError(f"{self.origin} lacks {name}, which has no default: add it")
        return default

    def integer(self, name: str, default: Any = _REQUIRED, *aliases: str) -> Any:
        """A whole number, or None if that is the default."""
        return self._typed(name, (int,), "a whole number", default, *aliases)

    def number(self, name: str, default: Any = _REQUIRED, *aliases: str) -> Any:
        """A number as float, or None if that is the default."""
        value = self._typed(name, (int, float), "a number", default, *aliases)
        return None if value is None else float(value)

    def listed(self, name: str, kind: type, what: str) -> list[Any] | None:
        """The list of `kind` under a name (what: the plural, for the error); None if there is none."""
        value = self.get(name, None)
        if value is not None and not (isinstance(value, list) and all(type(each) is kind for each in value)):
            raise ValueError(f"{self.origin}: {name} ({value!r}) must be a list of {what}")
        return value

    def flag(self, name: str, default: Any = _REQUIRED) -> bool:
        """true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{self.origin}: {name} ({value!r}) must be true or false")
        return value

    def only(self, name: str, allowed: Any, reason: str, default: Any = None) -> None:
        """Refuse any value of `name` but `allowed` (or one of them, if a tuple). default: what a missing key means."""
        values = allowed if isinstance(allowed, tuple) else (allowed,)
        value = self.get(name, values[0] if default is None else default)
        if value not in values:
            raise ValueError(f"{self.origin}: {name} ({value!r}) is not supported: {reason}")

    def ignore(self, *names: str) -> None:
        """Mark keys that have no effect in this family, or none beyond what was already read."""
        self._read.update(names)

    def finish(self) -> None:
        """Raise ValueError naming every key that was neither read nor known to have no effect."""
        left = {name: value for name, value in self.config.items() if name not in self._read | WITHOUT_EFFECT}
        if left:
            listed = ", ".join(f"{name} ({value!r})" for name, value in sorted(left.items()))
            raise ValueError(
                f"{self.origin} holds unknown keys: {listed}. Remove those that do not change what the model computes; "
                f"a model that needs the others is not supported"
            )

    def _typed(self, name: str, kinds: tuple[type, ...], what: str, default: Any, *aliases: str) -> Any:
        value = self.get(name, default, *aliases)
        if value is None and default is None:  # null is not another default: that would be a different model, or none
            return None
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise ValueError(f"{self.origin}: {name} ({value!r}) must be {what}")
        return value
