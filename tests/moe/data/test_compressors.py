from __future__ import annotations

import gzip
import lzma
import random

import pytest

from moe.data import compressors
from moe.data.compressors import measure


def some_text(seed: int, words: int) -> bytes:
    rng = random.Random(seed)
    vocabulary = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(400)]
    return " ".join(rng.choices(vocabulary, k=words)).encode()


def test_figures_are_the_tools_own() -> None:
    train, held_out = some_text(0, 4000), some_text(0, 600)
    bits = measure(train, held_out)
    assert bits.gzip == 8 * len(gzip.compress(held_out, 9, mtime=0)) / len(held_out)
    assert bits.xz == 8 * len(lzma.compress(held_out, preset=9)) / len(held_out)
    both, alone = (len(lzma.compress(text, preset=9)) for text in (train + held_out, train))
    assert bits.xz_given_train == 8 * (both - alone) / len(held_out)


def test_knowing_the_training_text_helps() -> None:
    bits = measure(some_text(1, 20_000), some_text(1, 300))  # words of one vocabulary
    assert bits.xz_given_train < 0.8 * bits.xz


@pytest.mark.parametrize("train_bytes", [0, 500, 1000, 5000])
@pytest.mark.parametrize("held_out_bytes", [400, 999, 1000, 3000])
def test_both_texts_together_fit_the_window(
    monkeypatch: pytest.MonkeyPatch, train_bytes: int, held_out_bytes: int
) -> None:
    """The end of the training text and the beginning of the held-out one, never more than the window holds."""
    monkeypatch.setattr(compressors, "WINDOW_BYTES", 1000)
    seen: list[bytes] = []
    monkeypatch.setattr(compressors, "_xz", lambda text: seen.append(text) or len(text))
    train, held_out = bytes(range(100)) * 50, some_text(3, 1000)
    train, held_out = train[len(train) - train_bytes :], held_out[:held_out_bytes]
    bits = measure(train, held_out)
    assert max(map(len, seen)) <= 1000
    assert seen[0] == held_out[:1000]
    room = 1000 - len(seen[0])
    if room and train:
        assert seen[1] == train[-room:] + held_out[:1000]
        assert seen[2] == train[-room:]
    assert bits.xz == bits.xz_given_train == 8.0


def test_without_training_text_both_are_equal() -> None:
    bits = measure(b"", some_text(2, 300))
    assert bits.xz_given_train == bits.xz
