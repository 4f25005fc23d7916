"""Perplexity of arbitrary text: files and folders as domains, by a stated protocol, per token, word and byte.

Perplexities are comparable only if preparation, separators and windows are the same, so these form one value,
`TextProtocol`, stored with every result. `PILE` is how Artetxe et al. 2021 measured out-of-domain text; `ROLLING`
is lm-eval's loglikelihood_rolling, whose windows it reproduces exactly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.perplexity import DocumentLosses, losses_by_document, perplexity_of
from moe.evaluation.scorer import BATCH_TOKENS, Request, score
from moe.model import Transformer


@dataclass(frozen=True)
class TextProtocol:
    """How text is prepared, joined and cut into windows for scoring."""

    preparation: str = "none"  # "pile": strip outer white space and merge runs of line breaks into one
    scope: str = "documents"  # each alone, begun like a prompt; "stream": all of a domain, concatenated
    line_breaks: str = "text"  # as the tokenizer has them; "separator": each is the end-of-text token, as in fairseq
    window: int | None = None  # tokens predicted in the first window; None is model.max_seq_len
    context: int = 1  # tokens a later window re-reads before those it predicts; 1 is non-overlapping
    last_window: str = "full"  # the last window has as much context as fits; "short": only `context`

    def __post_init__(self) -> None:
        choices = {
            "preparation": ("none", "pile"),
            "scope": ("documents", "stream"),
            "line_breaks": ("text", "separator"),
            "last_window": ("full", "short"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} ({getattr(self, name)!r}) must be one of: {', '.join(known)}")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window ({self.window}) must be at least 1, or None for the model's")
        if self.context < 1 or (self.window is not None and self.context > self.window):
            raise ValueError(
                f"context ({self.context}) must be at least 1, since a token is predicted from one before it, and at "
                f"most window ({self.window})"
            )


# documents concatenated with a blank line between, every line ended by a separator, blocks without carry-over
PILE = TextProtocol("pile", "stream", "separator", last_window="short")
ROLLING = TextProtocol()
PROTOCOLS = {"pile": PILE, "rolling": ROLLING}


class TextScore(NamedTuple):
    """One domain. All figures share the same sum of log-probabilities, divided by different units."""

    nats: float  # -Σ log p over all predicted tokens, separators included
    num_tokens: int  # predicted, separators included
    num_words: int  # of the prepared text, split at white space, counted as in lm-eval
    num_bytes: int  # of the prepared text in UTF-8
    num_documents: int
    num_windows: int
    documents: DocumentLosses | None = None  # those with at least one token, in order

    @property
    def cross_entropy(self) -> float:
        """Nats per token."""
        return self.nats / self.num_tokens

    @property
    def token_perplexity(self) -> float:
        return perplexity_of(self.nats / self.num_tokens)

    @property
    def word_perplexity(self) -> float:
        return perplexity_of(self.nats / self.num_words)

    @property
    def byte_perplexity(self) -> float:
        return perplexity_of(self.nats / self.num_bytes)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2.0) / self.num_bytes

    def figures(self) -> dict[str, Any]:
        """All figures for JSON, with None for a value that is not finite."""
        figures: dict[str, Any] = self._asdict()
        figures["documents"] = None if self.documents is None else self.documents._asdict()
        for name in ("cross_entropy", "token_perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"):
            value = getattr(self, name)
            figures[name] = value if math.isfinite(value) else None
        return figures


class Window(NamedTuple):
    """`tokens[start:]` are predicted, each from all tokens before it."""

    tokens: list[int]
    start: int


def windows(tokens: Sequence[int], prefix: int, protocol: TextProtocol, longest: int) -> Iterator[Window]:
    """Cut a text so that each token is predicted once. longest: the model's max_seq_len.

    The first window predicts up to `window` tokens after `prefix`; each later one up to window - context + 1 more,
    after `context` tokens. With last_window="full" every later window starts as early as it can, which at the end of
    the text is lm-eval's rule; with "short" it never re-reads more than `context`.
    """
    size = longest if protocol.window is None else protocol.window
    if size > longest or protocol.context > size:
        raise ValueError(
            f"window ({size}) must be at most model.max_seq_len ({longest}) and at least context ({protocol.context})"
        )
    text = [prefix, *tokens]  # text[i + 1] is token i
    done = min(size, len(tokens))
    if done:
        yield Window(text[: done + 1], 1)
    while done < len(tokens):
        end = min(len(tokens), done + size - protocol.context + 1)
        first = end - size if protocol.last_window == "full" else done + 1 - protocol.context
        yield Window(text[first : end + 1], done + 1 - first)
        done = end


def prepared(text: str, protocol: TextProtocol) -> str:
    """The text to score."""
    return re.sub(r"\n+", "\n", text.strip()) if protocol.preparation == "pile" else text


def document_tokens(documents: Sequence[str], tokenizer: Tokenizer, protocol: TextProtocol) -> list[list[int]]:
    """The tokens of each document, leaving out documents without any.

    With line_breaks="separator" every line ends with the end-of-text token, the last one included, and in a stream a
    blank line (one more such token) ends a document. Otherwise a stream has one end-of-text token after each document.
    """
    eos = tokenizer.eos_id
    by_line = protocol.line_breaks == "separator"
    texts = []
    for document in documents:
        if by_line:
            tokens = [token for line in document.split("\n") for token in (*tokenizer.encode(line), eos)]
        else:
            tokens = tokenizer.encode(document)
        texts.append([*tokens, eos] if protocol.scope == "stream" else tokens)
    return [tokens for tokens in texts if tokens]


def token_texts(documents: Sequence[list[int]], protocol: TextProtocol) -> list[list[int]]:
    """The token sequences to cut into windows: one per document, or one for all."""
    if protocol.scope == "stream":
        return [[token for tokens in documents for token in tokens]] if documents else []
    return list(documents)


def score_domain(
    model: Transformer,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    protocol: TextProtocol,
    *,
    batch_tokens: int = BATCH_TOKENS,
    precision: str = "fp32",
    world: World | None = None,
) -> TextScore:
    """Score the documents of one domain. Empty ones are left out.

    Whatever is cut into windows, a document or the stream, is preceded by `tokenizer.begin_id`. precision: of autocast.
    world: ranks that take turns; all must call. Raises ValueError if there is no text, and for windows longer than the
    model allows.
    """
    texts = [text for document in documents if (text := prepared(document, protocol))]
    longest = model.config.max_seq_len
    documents_tokens = document_tokens(texts, tokenizer, protocol)
    if not any(documents_tokens):
        raise ValueError("no document holds any text, so there is nothing to score: give files that are not empty")
    cut = [
        window
        for tokens in token_texts(documents_tokens, protocol)
        for window in windows(tokens, tokenizer.begin_id, protocol, longest)
    ]
    report = score(
        model,
        [Request(tokens, start) for tokens, start in cut],
        batch_tokens=batch_tokens,
        precision=precision,
        world=world,
    )
    nats = -torch.cat([torch.as_tensor(result.log_probs, dtype=torch.float64) for result in report.scores])
    return TextScore(
        nats=math.fsum(nats.tolist()),
        num_tokens=sum(len(window.tokens) - window.start for window in cut),
        num_words=sum(len(re.split(r"\s+", text)) for text in texts),
        num_bytes=sum(len(text.encode()) for text in texts),
        num_documents=len(texts),
        num_windows=len(cut),
        documents=losses_by_document(nats, [len(tokens) for tokens in documents_tokens]),
    )


def mean_perplexity(scores: Iterable[TextScore]) -> float | None:
    """The arithmetic mean of the domains' per-token perplexities, unweighted, as in the paper.

    None if it is not finite, as in `TextScore.figures`.
    """
    values = [value.token_perplexity for value in scores]
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
