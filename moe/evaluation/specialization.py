"""Do experts specialise by domain? Reads a finished run's token counts per expert and domain."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class LayerMap(NamedTuple):
    """One MoE layer: how the tokens of each domain are distributed over its experts."""

    layer: int  # index among the MoE layers, from 0
    domains: list[str]
    shares: np.ndarray  # (domains, experts), each row sums to 1

    @property
    def information(self) -> float:
        """I(expert; domain): bits that a token's expert reveals about its domain, with all domains equally likely.

        0 if all domains are distributed alike, log2(domains) if no two domains share an expert.
        """
        mean = self.shares.mean(axis=0)
        return float(_entropy(mean) - np.mean([_entropy(row) for row in self.shares]))

    @property
    def effective_experts(self) -> dict[str, float]:
        """exp of the entropy of each domain's distribution: as many equally used experts would have it."""
        return {domain: float(2 ** _entropy(row)) for domain, row in zip(self.domains, self.shares, strict=True)}

    @property
    def distances(self) -> np.ndarray:
        """(domains, domains) Jensen-Shannon divergence in bits: 0 for the same experts, 1 for none in common."""
        count = len(self.domains)
        result = np.zeros((count, count))
        for i in range(count):
            for j in range(i):
                middle = (self.shares[i] + self.shares[j]) / 2
                both = (_entropy(self.shares[i]) + _entropy(self.shares[j])) / 2
                result[i, j] = result[j, i] = _entropy(middle) - both
        return result

    def nearest(self, domain: str) -> str:
        """The domain with the most similar distribution over experts."""
        row = self.distances[self.domains.index(domain)].copy()
        row[self.domains.index(domain)] = np.inf
        return self.domains[int(row.argmin())]


def read_maps(run_dir: Path, split: str = "test") -> list[LayerMap]:
    """The maps of a finished run, one per MoE layer.

    Raises ValueError for a run that is unfinished, is dense, or has fewer than two domains.
    """
    path = run_dir / "results.json"
    if not path.is_file():
        raise ValueError(f"{run_dir} has no results.json: finish the run first")
    splits = json.loads(path.read_text(encoding="utf-8"))["splits"]
    if split not in splits:
        raise ValueError(f"split ({split!r}) must be one of: {', '.join(splits)}")
    counts: dict[str, list[list[int]]] = splits[split].get("tokens_per_expert_of_domains", {})
    if not counts:
        raise ValueError(
            f"{path} does not count experts by domain: the model is dense, or the file is of an older version"
        )
    if len(counts) < 2:
        raise ValueError(f"{path} has one domain ({next(iter(counts))}): there is nothing to compare")
    return [_map(layer, counts) for layer in range(len(next(iter(counts.values()))))]


def table(maps: list[LayerMap]) -> str:
    """A Markdown table of the layers, and one of the domains in the most specialised layer."""
    most = len(maps[0].domains)
    lines = [
        f"| sparse layer | bits of {np.log2(most):.2f} | experts in use, mean over domains |",
        "|---|---|---|",
        *(
            f"| {each.layer} | {each.information:.3f} | {np.mean(list(each.effective_experts.values())):.1f} |"
            for each in maps
        ),
    ]
    best = max(maps, key=lambda each: each.information)
    lines += [
        "",
        f"Sparse layer {best.layer}:",
        "",
        "| domain | experts in use | nearest | distance |",
        "|---|---|---|---|",
    ]
    for index, domain in enumerate(best.domains):
        near = best.nearest(domain)
        distance = best.distances[index, best.domains.index(near)]
        lines.append(f"| {domain} | {best.effective_experts[domain]:.1f} | {near} | {distance:.3f} |")
    return "\n".join(lines)


def plot(maps: list[LayerMap], path: Path) -> None:
    """A heat map per MoE layer: domains by experts, with experts sorted by the domain that uses them most."""
    from matplotlib.figure import Figure  # heavy, and needed only here

    height = 1.2 + 0.22 * len(maps[0].domains)
    figure = Figure(figsize=(10, height * len(maps)), layout="constrained")
    for index, each in enumerate(maps):
        axes: Any = figure.add_subplot(len(maps), 1, index + 1)
        order = np.argsort(each.shares.argmax(axis=0), kind="stable")
        image = axes.imshow(each.shares[:, order], aspect="auto", cmap="viridis", interpolation="nearest")
        axes.set_yticks(range(len(each.domains)), each.domains, fontsize=7)
        axes.set_xticks([])
        axes.set_xlabel(f"the {each.shares.shape[1]} experts of sparse layer {each.layer}")
        axes.set_title(f"expert says {each.information:.2f} bits of the domain", fontsize=9)
        figure.colorbar(image, ax=axes, label="share of the domain's choices")
    figure.savefig(path, dpi=120)


def _map(layer: int, counts: dict[str, list[list[int]]]) -> LayerMap:
    numbers = np.array([of_domain[layer] for of_domain in counts.values()], dtype=np.float64)  # (domains, experts)
    totals = numbers.sum(axis=1, keepdims=True)
    empty = [domain for domain, total in zip(counts, totals[:, 0], strict=True) if total == 0]
    if empty:
        raise ValueError(f"the domain {empty[0]} has no token in this split: choose another split")
    return LayerMap(layer, list(counts), numbers / totals)


def _entropy(shares: np.ndarray) -> float:
    """Entropy in bits."""
    positive = shares[shares > 0]
    return float(-(positive * np.log2(positive)).sum())
