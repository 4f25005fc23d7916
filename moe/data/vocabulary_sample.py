"""Samples of the corpus for training a tokenizer: evenly spread, or balanced over domains, within a budget of bytes."""

from __future__ import annotations

from moe.data.sampling import shares


class EvenSample:
    """An evenly spread sample of at most `budget` bytes: whenever it is too large, every second text is removed."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._texts: list[tuple[str, int]] = []
        self._size = self._seen = 0
        self._stride = 1

    def add(self, text: str, num_bytes: int) -> None:
        """Add a text, or skip it to keep the sample even."""
        if self._seen % self._stride == 0:
            self._texts.append((text, num_bytes))
            self._size += num_bytes
        self._seen += 1
        while self._size > self._budget and len(self._texts) > 1:
            self._texts = self._texts[::2]
            self._stride *= 2
            self._size = sum(size for _, size in self._texts)

    def texts(self) -> list[str]:
        """The texts of the sample, in the order in which they were added."""
        return [text for text, _ in self._texts]


class BalancedSample:
    """A sample of all domains. The share of a domain in the budget is proportional to its bytes ** alpha.

    XGLM's joint vocabulary used alpha 0.3. A domain with less text than its share is repeated; from a domain with more,
    texts are taken evenly. So the shares hold to within one text per domain. If the corpus is smaller than `budget`,
    its size is the budget.
    """

    def __init__(self, budget: int, alpha: float) -> None:
        self._budget = budget
        self._alpha = alpha
        self._samples: dict[str, EvenSample] = {}
        self._sizes: dict[str, int] = {}

    def add(self, domain: str, text: str, num_bytes: int) -> None:
        """Add a text to the sample of its domain, or skip it to keep that sample even."""
        self._samples.setdefault(domain, EvenSample(self._budget)).add(text, num_bytes)
        self._sizes[domain] = self._sizes.get(domain, 0) + num_bytes

    def texts(self) -> list[str]:
        """The texts, domain by domain."""
        total = min(self._budget, sum(self._sizes.values()))
        chosen: list[str] = []
        for domain, share in shares(self._sizes, alpha=self._alpha).items():
            chosen += _as_many_bytes(self._samples[domain].texts(), round(share * total))
        return chosen


def _as_many_bytes(texts: list[str], budget: int) -> list[str]:
    """Repeat `texts` or thin them out evenly to about `budget` bytes."""
    sizes = [len(text.encode()) for text in texts]
    whole, rest = divmod(budget, sum(sizes))
    thinned: list[str] = []
    passed = taken = 0
    for text, size in zip(texts, sizes, strict=True):
        passed += size
        if taken + size / 2 <= rest * passed / sum(sizes):  # closer to an even share of the bytes so far
            thinned.append(text)
            taken += size
    return texts * whole + thinned
