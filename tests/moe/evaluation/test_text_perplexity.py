"""Perplexity of any text: windows as lm-eval and fairseq cut them, sums as a loop over tokens gives them."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.cli import app
from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer, train_tokenizer
from moe.evaluation.text_domains import plot, read_domains, results, table
from moe.evaluation.text_perplexity import (
    PILE,
    ROLLING,
    TextProtocol,
    TextScore,
    document_tokens,
    prepared,
    score_domain,
    token_texts,
    windows,
)
from moe.model import Transformer

TOLERANCE = 1e-5  # of a sum of float32 log-probabilities
DOCUMENTS = ["\n\nThe first line.\n\n\nThe gate routes a token.  \n", "Café 漢字", "", " \n "]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the first line of a token that the gate routes"] * 10, vocab_size=290)


@pytest.fixture
def model(model_config: Callable[..., ModelConfig], tokenizer: Tokenizer) -> Transformer:
    model = Transformer(model_config(vocab_size=tokenizer.vocab_size, max_seq_len=16), dtype=torch.float64)
    model.reset_parameters(seed=0)
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model.eval()


def loop(model: Transformer, tokens: list[int], start: int) -> float:
    """-Σ log p of tokens[start:], each in a pass of its own."""
    total = 0.0
    with torch.no_grad():
        for place in range(start, len(tokens)):
            logits = model(torch.tensor([tokens[:place]])).logits[0, -1]
            total -= float(logits.log_softmax(-1)[tokens[place]])
    return total


def test_windows_are_lm_evals() -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="the oracle of rolling windows is lm-eval")
    rng = random.Random(0)
    cases = 0
    for _ in range(300):
        length, size = rng.randint(0, 40), rng.randint(1, 12)
        context = rng.randint(1, size)
        tokens = [rng.randint(1, 99) for _ in range(length)]
        theirs = list(utils.get_rolling_token_windows(tokens, 0, size, context))
        ours = list(windows(tokens, 0, replace(ROLLING, window=size, context=context), longest=20))
        assert [w.tokens[:-1] for w in ours] == [inputs for inputs, _ in theirs]
        assert [w.tokens[w.start :] for w in ours] == [predicted for _, predicted in theirs]
        cases += len(theirs) > 2
    assert cases > 50


def test_blocks_are_fairseqs() -> None:
    """Neighbouring blocks: the input of one is its own tokens, shifted by one, and nothing earlier."""
    tokens = list(range(1, 12))
    found = list(windows(tokens, 0, replace(PILE, window=4), longest=8))
    assert found == [([0, 1, 2, 3, 4], 1), ([4, 5, 6, 7, 8], 1), ([8, 9, 10, 11], 1)]


@pytest.mark.parametrize("last_window", ["full", "short"])
def test_every_token_is_predicted_once(last_window: str) -> None:
    for length in range(25):
        for context in range(1, 6):
            protocol = TextProtocol(window=5, context=context, last_window=last_window)
            found = list(windows(list(range(1, length + 1)), 0, protocol, longest=5))
            assert [token for w in found for token in w.tokens[w.start :]] == list(range(1, length + 1))
            assert all(w.start >= min(context, w.tokens[w.start]) for w in found)
            assert all(len(w.tokens) <= 6 for w in found)


def test_pile_text_is_stripped_and_has_no_empty_lines() -> None:
    assert [prepared(text, PILE) for text in DOCUMENTS] == [
        "The first line.\nThe gate routes a token.", "Café 漢字", "", "",
    ]  # fmt: skip
    assert [prepared(text, ROLLING) for text in DOCUMENTS] == DOCUMENTS


def test_pile_streams_end_lines_and_documents(tokenizer: Tokenizer) -> None:
    eos, encode = tokenizer.eos_id, tokenizer.encode
    (stream,) = token_texts(document_tokens(["a\nb", "c"], tokenizer, PILE), PILE)
    assert stream == [*encode("a"), eos, *encode("b"), eos, eos, *encode("c"), eos, eos]
    assert token_texts(document_tokens(["a\nb", "c"], tokenizer, ROLLING), ROLLING) == [encode("a\nb"), encode("c")]
    assert token_texts(
        document_tokens(["a\nb", "c"], tokenizer, TextProtocol(scope="stream")), TextProtocol(scope="stream")
    ) == [[*encode("a\nb"), eos, *encode("c"), eos]]


def test_rolling_sums_are_those_of_lm_evals_windows(model: Transformer, tokenizer: Tokenizer) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="the oracle of rolling windows is lm-eval")
    for context in (1, 5):
        found = score_domain(model, tokenizer, DOCUMENTS, replace(ROLLING, context=context))
        nats, words, num_bytes = 0.0, 0, 0
        for text in DOCUMENTS:
            if not text:
                continue
            for inputs, predicted in utils.get_rolling_token_windows(
                tokenizer.encode(text), tokenizer.eos_id, 16, context
            ):
                whole = [*inputs, predicted[-1]]
                nats += loop(model, whole, len(whole) - len(predicted))
            words += len(re.split(r"\s+", text))
            num_bytes += len(text.encode())
        assert found.nats == pytest.approx(nats, rel=TOLERANCE)
        assert (found.num_words, found.num_bytes, found.num_documents) == (words, num_bytes, 3)
        assert found.num_tokens == sum(len(tokenizer.encode(text)) for text in DOCUMENTS)
        assert found.word_perplexity == pytest.approx(math.exp(nats / words), rel=1e-4)
        assert found.bits_per_byte == pytest.approx(nats / num_bytes / math.log(2), rel=TOLERANCE)
        assert found.byte_perplexity == pytest.approx(2**found.bits_per_byte)


def test_pile_sums_are_those_of_its_blocks(model: Transformer, tokenizer: Tokenizer) -> None:
    found = score_domain(model, tokenizer, DOCUMENTS, replace(PILE, window=7))
    (stream,) = token_texts(document_tokens([prepared(text, PILE) for text in DOCUMENTS[:2]], tokenizer, PILE), PILE)
    text = [tokenizer.eos_id, *stream]
    blocks = [text[first : first + 8] for first in range(0, len(stream), 7)]
    assert found.nats == pytest.approx(sum(loop(model, block, 1) for block in blocks), rel=TOLERANCE)
    assert (found.num_tokens, found.num_windows, found.num_documents) == (len(stream), len(blocks), 2)
    assert found.documents is not None
    lengths = [len(tokens) for tokens in document_tokens([prepared(t, PILE) for t in DOCUMENTS[:2]], tokenizer, PILE)]
    assert found.documents.num_tokens == lengths
    assert sum(found.documents.nats) == pytest.approx(found.nats)
    first = [text[begin : min(begin + 8, lengths[0] + 1)] for begin in range(0, lengths[0], 7)]
    assert found.documents.nats[0] == pytest.approx(sum(loop(model, block, 1) for block in first), rel=TOLERANCE)
    longer = score_domain(model, tokenizer, DOCUMENTS, replace(PILE, window=7, context=4))
    assert longer.num_windows > found.num_windows and longer.nats != pytest.approx(found.nats, rel=TOLERANCE)


def test_what_no_float_holds_is_null_and_not_an_error() -> None:
    value = TextScore(1e6, 2000, 10, 5000, 1, 1)
    figures = value.figures()
    assert figures["word_perplexity"] is None and figures["token_perplexity"] == pytest.approx(math.exp(500))
    assert value.word_perplexity == math.inf
    assert "| x | no | 1.404e+217 | above 1e308 |" in table(results({"x": value}))
    found = results({"x": value, "y": TextScore(1e6, 1000, 10, 10, 1, 1)})
    assert found["out_of_domain_mean_perplexity"] is None
    json.dumps(found, allow_nan=False)
    table(found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preparation": "clean"}, r"preparation \('clean'\) must be one of: none, pile"),
        ({"window": 0}, r"window \(0\) must be at least 1"),
        ({"context": 0}, r"context \(0\) must be at least 1"),
        ({"window": 4, "context": 5}, r"context \(5\).*at most window \(4\)"),
    ],
)
def test_protocols_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TextProtocol(**options)


def test_what_cannot_be_scored_is_refused(
    model: Transformer, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="nothing to score"):
        score_domain(model, tokenizer, ["", " \n"], PILE)
    with pytest.raises(ValueError, match=r"window \(17\) must be at most model.max_seq_len \(16\)"):
        score_domain(model, tokenizer, ["a"], replace(ROLLING, window=17))
    monkeypatch.setattr(tokenizer, "encode", lambda text: [])  # as tokenizers that drop white space do of a blank text
    with pytest.raises(ValueError, match="nothing to score"):
        score_domain(model, tokenizer, [" \n"], ROLLING)


def test_domains_come_from_files_folders_and_fields(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("one\n\n" * 20000)  # larger than a training piece: one document all the same
    folder = tmp_path / "law"
    folder.mkdir()
    (folder / "a.jsonl").write_text('{"text": "x"}\n{"text": "y"}\n')
    (folder / "b.txt").write_text("z")
    found = read_domains([str(tmp_path / "prose.txt"), str(folder)])
    assert {name: len(texts) for name, texts in found.items()} == {"prose": 1, "law": 3}
    limited = read_domains([str(tmp_path / "prose.txt"), str(folder)], max_bytes=2)
    assert {name: len(texts) for name, texts in limited.items()} == {"prose": 1, "law": 2}
    pile = tmp_path / "pile.jsonl"
    rows = [
        {"text": f"t{i}", "meta": {"pile_set_name": name}} for i, name in enumerate(["Github", "FreeLaw", "Github"])
    ]
    pile.write_text("\n".join(map(json.dumps, rows)))
    assert read_domains([str(pile)], domain_field="meta.pile_set_name") == {"Github": ["t0", "t2"], "FreeLaw": ["t1"]}
    with pytest.raises(ValueError, match=r"pile.jsonl line 1 has no text in the field 'meta.name'"):
        read_domains([str(pile)], domain_field="meta.name")
    with pytest.raises(ValueError, match=r"prose.txt is none: unpack it"):
        read_domains([str(tmp_path / "prose.txt")], domain_field="meta")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8"):
        read_domains([str(tmp_path / "latin.txt")])


def test_what_is_wrong_is_found_before_a_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("a prose")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "results.json").write_text("{}")
    for options, message in [
        (["--in-domain", "news"], "in_domain names 'news', which is none of the domains: prose"),
        (["--max-bytes", "-5"], r"max_bytes \(-5\) must be at least 1 byte"),
        (["--out", str(tmp_path / "old")], "old holds the results of an evaluation; choose another --out"),
    ]:
        command = ["perplexity", str(tmp_path / "no run"), str(tmp_path / "prose.txt"), "--out", str(tmp_path / "new")]
        with pytest.raises(ValueError, match=message):
            app([*command, *options], standalone_mode=False)
    assert not (tmp_path / "new").exists()
    assert (tmp_path / "old" / "results.json").read_text() == "{}"


def test_table_and_plot_hold_every_domain(tmp_path: Path) -> None:
    scores = {"law": TextScore(20.0, 10, 5, 40, 1, 1), "news": TextScore(10.0, 10, 5, 40, 1, 1)}
    found = results(scores, ["news"])
    assert found["in_domain_mean_perplexity"] == pytest.approx(math.e)
    assert found["out_of_domain_mean_perplexity"] == pytest.approx(math.e**2)
    text = table(found)
    assert "| law | no | 7.389 | 54.6 |" in text and "| mean, in domain | | 2.718 |" in text
    plot(tmp_path / "plot.png", found)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="in_domain names 'press'"):
        results(scores, ["press"])
