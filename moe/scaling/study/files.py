"""Reads a study's YAML file, strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from moe.compose import CONFIGS
from moe.config.study import StudyConfig

_STUDIES = CONFIGS / "study"


def read_study(name: str, overrides: Sequence[str] = ()) -> StudyConfig:
    """Read a study from a file, or by name from configs/study, with `key=value` overrides (`folder=...`, `jobs=4`).

    Raises ValueError for a study that does not exist, an unknown key and an invalid value.
    """
    path = _find(name)
    written = _parsed(str(path), lambda: OmegaConf.create(path.read_text(encoding="utf-8")))
    given = _parsed("the study's overrides", lambda: OmegaConf.from_dotlist(list(_checked(overrides))))
    try:
        tree = OmegaConf.merge(OmegaConf.structured(StudyConfig), written, given)
        study = OmegaConf.to_object(tree)
    except OmegaConfBaseException as error:
        key = re.search(r"full_key: (\S+)", str(error))
        where = "" if key is None else f"{key[1]}: "
        raise ValueError(f"{path}: {where}{str(error).strip().splitlines()[0]}") from error
    assert isinstance(study, StudyConfig)
    return study


def _parsed(where: str, parse: Callable[[], Any]) -> Any:
    """The result of `parse`. Raises ValueError, saying where, for invalid YAML."""
    try:
        return parse()
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: this is no YAML: {' '.join(str(error).split())}") from error


def stored_study(folder: Path) -> StudyConfig:
    """The study that `moe scale run` left in its folder."""
    tree = json.loads((folder / "study.json").read_text(encoding="utf-8"))["study"]
    study = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(StudyConfig), tree))
    assert isinstance(study, StudyConfig)
    return study


def study_folder(study: StudyConfig) -> Path:
    """The folder that holds the whole study."""
    return Path("studies") / study.name if study.folder is None else Path(study.folder).expanduser()


def fill(study: StudyConfig, texts: Sequence[str], **fields: str) -> list[str]:
    """`texts` with {data_folder} and the given fields filled in; other braces, such as {domain}, stay."""
    values = dict(fields)
    if study.data_folder is not None:
        values["data_folder"] = study.data_folder
    filled = []
    for text in texts:
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", value)
        if "{data_folder}" in text:
            raise ValueError(f"{text} needs data_folder, which is null: add data_folder=PATH, the folder of the texts")
        filled.append(text)
    return filled


def _find(name: str) -> Path:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ValueError(
                f"the study {name} is not a file that exists: give the path of one, or a name in configs/study"
            )
        return path
    preset = _STUDIES / f"{name}.yaml"
    if not preset.is_file():
        there = ", ".join(sorted(file.stem for file in _STUDIES.glob("*.yaml")))
        raise ValueError(f"there is no study {name!r}: give a .yaml file, or one of: {there}")
    return preset


def _checked(overrides: Sequence[str]) -> Sequence[str]:
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is no override of the study: they are written key=value")
    return overrides
