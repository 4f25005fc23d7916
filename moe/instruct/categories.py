"""One taxonomy for all benchmarks: their clusters, merged by hand into categories (Iyer et al. 2022)."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from moe.instruct.yaml_files import read_yaml

DEFAULT_TABLE = Path(__file__).parents[1] / "configs" / "instruct" / "categories.yaml"


class Categories:
    """Maps a benchmark's own cluster names to categories; each cluster is in exactly one."""

    def __init__(self, table: dict[str, list[str]], origin: str = "the category table") -> None:
        """`table` maps each category to other names of its clusters. Raises ValueError for a name in two categories."""
        self.origin = origin
        self.names = tuple(table)
        self._category: dict[str, str] = {}
        for category, aliases in table.items():
            for name in (category, *aliases):
                known = self._category.setdefault(_normalise(name), category)
                if known != category:
                    raise ValueError(f"{origin}: cluster {name!r} is under {known!r} and under {category!r}; keep one")

    @classmethod
    def load(cls, path: Path = DEFAULT_TABLE) -> Categories:
        """Read a YAML file with one mapping, category to list of clusters."""
        table = read_yaml(path)
        if not isinstance(table, dict) or not all(
            isinstance(key, str) and isinstance(value, list) and all(isinstance(name, str) for name in value)
            for key, value in table.items()
        ):
            raise ValueError(f"{path} must map every category to a list of cluster names")
        return cls(table, str(path))

    def of(self, cluster: str, where: str) -> str:
        """The category of a cluster. Raises ValueError naming the cluster, `where` and similar names."""
        category = self._category.get(_normalise(cluster))
        if category is None:
            near = difflib.get_close_matches(_normalise(cluster), self._category, n=3)
            hint = f"; near are: {', '.join(near)}" if near else ""
            raise ValueError(f"{where}: category {cluster!r} is unknown{hint}. Add it to {self.origin}")
        return category


def _normalise(name: str) -> str:
    """Benchmarks differ in case, spaces, hyphens and underscores; a slash is part of CrossFit's names."""
    return re.sub(r"[\s_-]+", " ", name).strip().lower()
