"""Compose overrides into a RunConfig or another command's configuration. No other module uses Hydra, except for a
study's jobs (moe.scaling.study.hydra_job).

Configs are found by absolute path, because `pkg://` does not see through the symlink `moe/configs`. The composed tree
is merged once more into the typed dataclasses, which reject unknown keys.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.config import RunConfig
from moe.config.errors import plainer
from moe.config.fields import (
    as_override,
    changed_values,
    described,
    field_names,
    flatten,
    is_required,
    optional_parts,
    set_at,
    value_at,
)

CONFIGS = Path(__file__).parent / "configs"
_MULTIRUN = ("-m", "--multirun")
Schema = TypeVar("Schema")

# fields that set where and how a run executes, when it gives up, what it logs and how samples.txt is drawn, not what is
# learnt: they, and all of `parallel`, may change when a run is continued. eval.every and eval.max_tokens may not:
# tune.keep_best selects the model by their figures
NOT_IDENTITY = (
    "run_dir",
    "resume",
    "device",
    "data.cache_dir",
    "data.num_workers",
    "train.checkpoint_every",
    "train.keep_last",
    "train.keep_every",
    "train.async_save",
    "train.keep_freed_memory",
    "train.recompute",
    "train.compile",
    "train.max_skipped_steps",
    "train.histogram_every",
    "eval.prompts",
    "eval.sample_tokens",
    "eval.temperature",
    "eval.top_p",
)


def compose(overrides: Sequence[str]) -> RunConfig:
    """The checked configuration for Hydra-style overrides. Raises ValueError that says what to change."""
    return compose_top("train", RunConfig, overrides)


def compose_top(top: str, schema: type[Schema], overrides: Sequence[str]) -> Schema:
    """Like `compose`, from configs/`top`.yaml into the dataclass `schema`.

    The top file's defaults list begins with `schema`; its other groups are the presets that the command accepts.
    Fields of `schema` without a default must come from the tree.
    """
    _require_config_tree()
    _check_overrides(top, overrides)
    of_whole_parts = _of_whole_parts(schema, overrides)
    others = [override for override in overrides if override not in of_whole_parts]
    try:
        plain = _hydra_tree(top, schema, others)
        for override in _parse(of_whole_parts):
            set_at(plain, override.key_or_group, override.value())
        return _to_object(schema, plain)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain_null(top, schema, others) or _explain(error, top, schema, overrides)) from error
    except AssertionError as error:  # raised by OmegaConf for a key inside a null part
        explanation = _explain_null(top, schema, others)
        if explanation is None:
            raise
        raise ValueError(explanation) from error


def _hydra_tree(top: str, schema: type[Any], overrides: Sequence[str]) -> dict[str, Any]:
    """The tree that Hydra composes from the overrides, as plain dicts. Raises Hydra's own errors."""
    GlobalHydra.instance().clear()
    # typed defaults lie under everything: a preset states only what it changes, an override may name any field
    ConfigStore.instance().store("schema", schema)
    with initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        composed = hydra_compose(top, overrides=[_as_list(override) for override in overrides])
    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    return cast("dict[str, Any]", plain)


def _of_whole_parts(schema: type[Any], overrides: Sequence[str]) -> list[str]:
    """Overrides that set a whole optional part (`model.rope_scaling={kind: linear, factor: 2.0}`) or its fields.

    They are applied outside Hydra, because OmegaConf cannot put a dict where a part is null.
    """
    parsed = _parse(overrides)
    parts = [
        override.key_or_group
        for override in parsed
        if override.key_or_group in optional_parts(schema) and isinstance(override.value(), dict)
    ]
    return [
        str(override.input_line)
        for override in parsed
        if not override.is_delete() and any(f"{override.key_or_group}.".startswith(f"{part}.") for part in parts)
    ]


def expand_multirun(arguments: Sequence[str]) -> list[list[str]]:
    """The override lists of one run or, with -m, several: `-m a=1,2 b=x` is [a=1, b=x] and [a=2, b=x].

    Raises ValueError for unknown options, for sweeps that do not list their values, and for different runs that share
    a run folder: only the first could be trained.
    """
    overrides = [argument for argument in arguments if argument not in _MULTIRUN]
    unknown = [argument for argument in overrides if argument.startswith("-")]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]}; there are -m (several runs) and --help, the rest is key=value")
    if len(overrides) == len(arguments):
        return [overrides]
    runs: list[list[str]] = [[]]
    for override in _parse(overrides):
        values = [str(override.input_line)]
        if override.is_sweep_override():
            key = override.get_key_element()
            try:
                values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            except HydraException as error:  # glob and interval, which only a study's launcher could expand
                raise ValueError(
                    f"{override.input_line} does not say which values there are: name them, as {key}=A,B"
                ) from error
        runs = [[*run, value] for run in runs for value in values]
    _refuse_shared_folders(runs)
    return runs


def to_yaml(config: RunConfig) -> str:
    """The whole configuration as YAML; `from_yaml` reads it back."""
    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_yaml(text: str) -> RunConfig:
    """The configuration in `to_yaml`'s text. Raises ValueError for unknown, missing or invalid fields."""
    try:
        return _to_object(RunConfig, OmegaConf.to_container(OmegaConf.create(text)))
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise ValueError(f"this is no run configuration of this version: {_first_line(error)}") from error


def differences(stored: RunConfig, given: RunConfig) -> list[str]:
    """The fields that make two configurations different runs, such as "model.d_ff: 512 != 256"."""
    a, b = identity(stored), identity(given)
    return [f"{key}: {a.get(key)} != {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def identity(config: RunConfig) -> dict[str, Any]:
    """All fields that define a run, flat: {"model.d_ff": 512, ...}."""
    flat = flatten(dataclasses.asdict(config))
    return {key: value for key, value in flat.items() if key not in NOT_IDENTITY and not key.startswith("parallel.")}


def config_hash(config: RunConfig) -> str:
    """Hexadecimal SHA-256 of `identity`."""
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()


def overrides_for(config: RunConfig, parts: Sequence[str], *chosen: str) -> list[str]:
    """Overrides that reproduce `parts` of `config` ("model", "train.batch_tokens"): presets, `chosen`, values."""
    groups = {"model": config.model.name, "data": config.data.name}
    plain = _hydra_tree("train", RunConfig, [])
    known = [
        f"{group}={name}"
        for group, name in groups.items()
        if group in parts and name in _presets(group) and plain[group]["name"] != name
    ]
    given = [*known, *chosen]
    base, wanted = _hydra_tree("train", RunConfig, given), dataclasses.asdict(config)
    changes: list[str] = []
    for part in parts:
        changes += [f"{key}={as_override(value)}" for key, value in changed_values(base, wanted, part)]
    return [*given, *changes]


def usage(top: str = "train", schema: type[Any] = RunConfig, *, to_choose: Sequence[str] = ()) -> str:
    """Presets of a command, and every key with its meaning and default, but for groups `to_choose`, which have none."""
    config = compose_top(top, schema, [f"{group}={_presets(group)[0]}" for group in to_choose])
    values = dataclasses.asdict(config) | dict.fromkeys(to_choose)
    presets = [f"  {'+' if group == 'moe' else ''}{group}=  {'  '.join(_presets(group))}" for group in _groups(top)]
    heading = "keys with their defaults (without one: of a part that is null or must be chosen, as model.moe):"
    return "\n".join(["presets:", *presets, "", heading, *(f"  {line}" for line in described(schema, values))])


def _refuse_shared_folders(runs: list[list[str]]) -> None:
    first: dict[str, RunConfig] = {}
    for overrides in runs if len(runs) > 1 else []:
        if not any(override.lstrip("+").startswith("run_dir=") for override in overrides):
            continue  # each unnamed folder belongs to one run
        config = compose(overrides)
        if config.run_dir is None:
            continue
        changed = differences(first.setdefault(os.path.abspath(config.run_dir), config), config)
        if changed:
            raise ValueError(
                f"run_dir={config.run_dir} is the folder of several runs of -m, which differ in {'; '.join(changed)}: "
                f"leave run_dir out, and each has a folder of its own"
            )


def _to_object(schema: type[Schema], plain: Any) -> Schema:
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    assert isinstance(config, schema)
    return config


def _require_config_tree() -> None:
    if CONFIGS.is_file():
        raise ValueError(
            f"{CONFIGS} is a text file, not a symbolic link: this git checkout was made without symlinks. Run "
            f"`git config core.symlinks true && git checkout -- moe/configs moe/kernels` or install the wheel"
        )
    if not (CONFIGS / "train.yaml").is_file():
        raise ValueError(f"{CONFIGS}/train.yaml does not exist: the installation is incomplete, install it again")


def _check_overrides(top: str, overrides: Sequence[str]) -> None:
    """Reject bad overrides with clearer errors than Hydra's."""
    groups = _groups(top)
    for override in _parse(overrides):
        key, line = override.key_or_group, str(override.input_line)
        if re.match(r"[+~]*hydra[./]", line):  # Hydra would accept it and do nothing
            raise ValueError(
                f"{line} sets Hydra's own launching, which is not used here: run_dir= is where a run writes"
            )
        if override.is_sweep_override():
            raise ValueError(f"{line} names several values: start several runs with -m")
        if key and (CONFIGS / key).is_dir() and key not in groups:
            others = [file.stem for file in sorted(CONFIGS.glob("*.yaml")) if key in _groups(file.stem)]
            raise ValueError(f"{key}= is only for `moe {'`, `moe '.join(others)}`; there are: {', '.join(groups)}")
        if key not in groups or override.is_delete():
            continue
        value, presets = override.value(), _presets(key)
        if not isinstance(value, (str, list, dict)):
            raise ValueError(f"{line} names no preset: leave {key}= out, or choose one of: {', '.join(presets)}")
        if isinstance(value, str) and value not in presets:
            near = difflib.get_close_matches(value, presets, n=3) or [name for name in presets if value in name]
            hint = f"did you mean {', '.join(near)}? There are" if near else "there are"
            raise ValueError(f"{key} preset {value!r} does not exist; {hint}: {', '.join(presets)}")


def _parse(overrides: Sequence[str]) -> list[Any]:
    parsed = []
    for override in overrides:
        try:
            parsed.append(OverridesParser.create().parse_override(override))
        except HydraException as error:
            raise ValueError(
                f"{override!r} cannot be read: overrides are written key=value, without spaces around the =, and a "
                f"value that holds spaces, commas or brackets is quoted twice, 'key=\"a, b\"'"
            ) from error
    return parsed


def _as_list(override: str) -> str:
    """Wrap a single data.path in a list."""
    match = re.fullmatch(r"(\+?\+?data\.path)=([^\[].*)", override)
    return override if match is None else f"{match[1]}={as_override([_unquoted(match[2])])}"


def _unquoted(value: str) -> str:
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"" else value


def _groups(top: str) -> list[str]:
    """The groups that configs/`top`.yaml lists, and `moe`, which an override adds."""
    listed = re.findall(r"^ +- (?:optional )?(\w+): ", (CONFIGS / f"{top}.yaml").read_text(), re.MULTILINE)
    return sorted({*listed, "moe"})


def _presets(group: str) -> list[str]:
    return sorted(str(file.relative_to(CONFIGS / group).with_suffix("")) for file in (CONFIGS / group).rglob("*.yaml"))


def _explain(error: Exception, top: str, schema: type[Any], overrides: Sequence[str]) -> str:
    """What went wrong, with which value, and what to write instead."""
    text = _first_line(error)
    if error.__cause__ is not None and text.startswith("Error merging override"):
        text = f"{text.removeprefix('Error merging override ')}: {plainer(_first_line(error.__cause__))}"
    missing = re.search(r"(?:Structured config of type `\w+` has m|M)issing mandatory value: (\w+)(?![\w.])", text)
    if missing is not None:
        return _explain_missing(missing[1], str(error), top)
    full_key = re.search(r"full_key: (\S+)", str(error))
    if full_key is not None and full_key[1] not in text:
        text = f"{full_key[1]}: {text}"
    of_experts = _explain_experts(text, overrides)
    if of_experts is not None:
        return of_experts
    unknown = re.search(r"Could not override '([^']+)'", text) or re.search(r"^(\S+): Key '", text)
    if unknown is None:
        unknown = re.search(r"Key '([^']+)' not in", text)
    if unknown is not None:
        for key in field_names(schema, of_dicts=True):
            if f"{unknown[1]}.".startswith(f"{key}."):
                return f"{key} takes any names and holds none yet, so they are added: write +{key}= with the plus"
        known = [*field_names(schema), *_groups(top)]
        last = unknown[1].rpartition(".")[2]
        close = [key for key in known if key.rpartition(".")[2] == last]
        close = close or difflib.get_close_matches(unknown[1], known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "`python train.py --help` lists every key"
        return f"there is no key {unknown[1]!r}; {hint}"
    return text


def _explain_null(top: str, schema: type[Any], overrides: Sequence[str]) -> str | None:
    """Explain which override sets a field of a null part, and how to enable the part; None if none does.

    A mistake in the other overrides is explained instead.
    """
    parts = optional_parts(schema)
    below = {
        str(override.input_line): within
        for override in _parse(overrides)
        if (within := [part for part in parts if override.key_or_group.startswith(f"{part}.")])
    }
    if not below:
        return None
    try:
        plain = _hydra_tree(top, schema, [override for override in overrides if override not in below])
    except (HydraException, OmegaConfBaseException) as error:
        return _explain(error, top, schema, overrides)  # another mistake
    for override, within in below.items():
        for part in within:  # outer parts first
            if value_at(plain, part) is None:
                return _how_to_have(part, parts[part], top, override, overrides)
    return None


def _how_to_have(part: str, of: type[Any], top: str, override: str, overrides: Sequence[str]) -> str:
    """The error for an override that sets a field of a null part."""
    if f"{part}=null" in overrides:
        return f"{part}=null leaves no {part} of which {override} could be set: leave one of them out"
    group = part.split(".")[-1]
    if group == "moe":
        return f"{part} is null, so {override} changes nothing: add +moe=PRESET, for instance +moe=8e"
    if group in _groups(top):
        presets = ", ".join(_presets(group))
        return f"{part} is null, so {override} changes nothing: add {group}=PRESET; there are: {presets}"
    name, _, value = override.lstrip("+~")[len(part) + 1 :].partition("=")
    needed = {entry.name: entry.name.upper() for entry in dataclasses.fields(of) if is_required(entry)}
    fields = ", ".join(f"{key}: {text}" for key, text in (needed | {name: value or "VALUE"}).items())
    return f"{part} is null, so {override} changes nothing: give it whole, '{part}={{{fields}}}'"


def _explain_experts(text: str, overrides: Sequence[str]) -> str | None:
    """Explain a missing or surplus plus before moe= or another group; None for other mistakes."""
    if any(override.startswith("moe=") for override in overrides) and "Could not override" in text:
        return f"{text}; a model has no experts unless they are added: write +moe= with the plus"
    if any(override.startswith("+moe=") for override in overrides) and "Multiple values for moe" in text:
        if sum(override.startswith("+moe=") for override in overrides) > 1:
            return "+moe= is given more than once: a model has one kind of sparse layer, keep one of them"
        return "the model has experts already, of its preset or experiment: write moe= without the plus"
    twice = re.match(r"Multiple values for (\w+)\.", text)
    return f"{twice[1]} is chosen already: write {twice[1]}= once, without a plus" if twice else None


def _explain_missing(name: str, error: str, top: str) -> str:
    """Explain a group that was not chosen or a field that its preset does not state."""
    if name in _groups(top):
        return f"{name} is not chosen: add {name}=NAME; there are: {', '.join(_presets(name))}"
    full_key = re.search(r"full_key: (\S+)", error)
    key = name if full_key is None else full_key[1]
    return f"{key} is not set: its preset does not state it; write it there, or add {key}=VALUE"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
