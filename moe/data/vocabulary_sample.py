"""The text that a vocabulary is trained on: at most a budget of bytes, spread evenly over the corpus."""

from __future__ import annotations

from moe.data.sampling import shares


class EvenSample:
    """Texts of at most `budget` bytes, spread evenly: when they are too many, every second one is let go."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._texts: list[tuple[str, int]] = []
        self._size = self._seen = 0
        self._stride = 1

    def add(self, text: str, num_bytes: int) -> None:
        """Take one more text, or let it go."""
        if self._seen % self._stride == 0:
            self._texts.append((text, num_bytes))
            self._size += num_bytes
        self._seen += 1
        while self._size > self._budget and len(self._texts) > 1:
            self._texts = self._texts[::2]
            self._stride *= 2
            self._size = sum(size for _, size in self._texts)

    def texts(self) -> list[str]:
        """The texts that stayed, in order."""
        return [text for text, _ in self._texts]


class BalancedSample:
    """Texts of all domains, each with its share of `budget` bytes: share ~ bytes ** alpha.

    XGLM's joint vocabulary has alpha 0.3. A domain with less text than its share is repeated, so that its
    pieces count as often as the share says; of one with more, texts are taken evenly, so that the
    shares hold to within one text. The budget is that of the whole corpus where that is smaller.
    """

    def __init__(self, budget: int, alpha: float) -> None:
        self._budget = budget
        self._alpha = alpha
        self._samples: dict[str, EvenSample] = {}
        self._sizes: dict[str, int] = {}

    def add(self, domain: str, text: str, num_bytes: int) -> None:
        """Take one more text, or let it go."""
        self._samples.setdefault(domain, EvenSample(self._budget)).add(text, num_bytes)
        self._sizes[domain] = self._sizes.get(domain, 0) + num_bytes

    def texts(self) -> list[str]:
        """The texts of one domain after another."""
        total = min(self._budget, sum(self._sizes.values()))
        chosen: list[str] = []
        for domain, share in shares(self._sizes, alpha=self._alpha).items():
            chosen += _as_many_bytes(self._samples[domain].texts(), round(share * total))
        return chosen


def _as_many_bytes(texts: list[str], budget: int) -> list[str]:
    """`texts` repeated or thinned out evenly to about `budget` bytes."""
    sizes = [len(text.encode()) for text in texts]
    whole, rest = divmod(budget, sum(sizes))
    thinned: list[str] = []
    passed = taken = 0
    for text, size in zip(texts, sizes, strict=True):
        passed += size
        if taken + size / 2 <= rest * passed / sum(sizes):  # the nearest to an even share of what has passed
            thinned.append(text)
            taken += size
    return texts * whole + thinned
