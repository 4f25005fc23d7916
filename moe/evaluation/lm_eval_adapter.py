"""Exposes a model to lm-eval: log-likelihoods, rolling log-likelihoods and generation.

lm-eval sees a single process. Every rank gets all requests, the ranks share the work, and every rank gets all answers,
so scores are the same for any number of ranks.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.scorer import BATCH_TOKENS, Request
from moe.evaluation.shared_prefixes import MIN_PREFIX, drops_tokens, is_shared, score_sharing_prefixes
from moe.generation import StoppedText, generate
from moe.model import Transformer

BEGINNINGS = ("auto", "none")
_MAX_NEW_TOKENS = 256  # for a task that sets no limit, as in lm-eval's own models
_LOGIT_BYTES = 512 * 2**20  # float32 logits (B, S, V) of one forward pass
_GENERATION_OPTIONS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}


@dataclass
class RequestCount:
    """Totals for one kind of request."""

    requests: int = 0
    truncated: int = 0  # requests that lost tokens on the left because they exceed the model's length
    forward_tokens: int = 0  # tokens run through the model, without padding and repetitions


class _Options(NamedTuple):
    """How to generate a text."""

    max_new_tokens: int
    until: tuple[str, ...]
    temperature: float  # 0 is greedy
    top_p: float


class _Prompt(NamedTuple):
    """A context that fits the model, with an identity that distinguishes it from every other."""

    number: int  # index of the request
    tokens: list[int]
    options: _Options
    identity: str  # seed, context, options and the index among identical requests


class LmEvalModel(TemplateLM):
    """Implements lm-eval's interface with a whole model on each rank, or one that the ranks share.

    beginning: what precedes a context. "auto" is the tokenizer's `begin_id` (the document separator, or whatever its
    makers use instead), since a prompt begins a document. "none" is nothing, like lm-eval's `hf` model for tokenizers
    that add none; an empty context and a rolling text still begin with that token. batch_tokens: positions per forward
    pass, lowered for large vocabularies (512 MiB of logits). end_ids: the tokens that end a written text; `None` is the
    tokenizer's `eos_id` alone. A context that is too long loses its first tokens, which
    `counts` records; scored tokens are never cut.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        beginning: str = "auto",
        batch_tokens: int = BATCH_TOKENS,
        precision: str = "fp32",
        seed: int = 0,
        min_prefix: int = MIN_PREFIX,
        end_ids: Collection[int] | None = None,
        world: World | None = None,
    ) -> None:
        super().__init__()
        vocab_size = model.config.vocab_size
        assert vocab_size is not None
        if beginning not in BEGINNINGS:
            raise ValueError(f"beginning ({beginning!r}) must be one of: {', '.join(BEGINNINGS)}")
        if tokenizer.vocab_size > vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, more than the model's vocab_size ({vocab_size}): "
                f"use the tokenizer that the model was trained with"
            )
        self.model = model
        self.text_tokenizer = tokenizer  # TemplateLM's `tokenizer` is a transformers one
        self.beginning = beginning
        self.batch_tokens = min(batch_tokens, max(1, _LOGIT_BYTES // (4 * vocab_size)))
        self.precision = precision
        self.seed = seed
        self.min_prefix = min_prefix
        self.end_ids = {tokenizer.eos_id} if end_ids is None else set(end_ids)
        self.world = world
        self.counts: dict[str, RequestCount] = {}
        self._device = model.embedding.weight.device if world is None else world.device

    @property
    def max_length(self) -> int:
        return self.model.config.max_seq_len

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.text_tokenizer.begin_id

    @property
    def tokenizer_name(self) -> str:
        return self.text_tokenizer.hash

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids, preceded by the beginning token unless `add_special_tokens` is False."""
        begins = self.beginning == "auto" and add_special_tokens is not False
        return [*([self.prefix_token_id] if begins else []), *self.text_tokenizer.encode(string)]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether greedy decoding would produce it) of each continuation."""
        asked = []
        for texts, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"a continuation ({_beginning(texts)}) has no token of its own: its text is empty, or part of the "
                    f"context's last token; change the task's texts"
                )
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens ({_beginning(texts)}) is longer than "
                    f"model.max_seq_len ({self.max_length}), and what is scored is never cut: leave out the task, or "
                    f"choose a model with a longer context"
                )
            asked.append(Request([*context, *continuation], len(context)))
        return [(sum(log_probs), all(greedy)) for log_probs, greedy in self._score(asked, "loglikelihood", greedy=True)]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text in nats; windows of the model's length predict each token once."""
        asked, ends = [], []
        for instance in requests:
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            # a window's inputs and targets are the same tokens shifted by one
            asked += [Request([*inputs, targets[-1]], len(inputs) + 1 - len(targets)) for inputs, targets in windows]
            ends.append(len(asked))
        sums = [sum(log_probs) for log_probs, _ in self._score(asked, "loglikelihood_rolling", greedy=False)]
        starts = [0, *ends][: len(ends)]
        return [sum(sums[start:end]) for start, end in zip(starts, ends, strict=True)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context up to the first stop string or separator, both excluded."""
        count = self.counts.setdefault("generate_until", RequestCount())
        count.requests += len(requests)
        prompts, copies = [], Counter[str]()
        for number, instance in enumerate(requests):
            context, given = instance.args
            options = self._generation_options(given)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - options.max_new_tokens
            identity = repr((self.seed, tokens, options))
            prompts.append(_Prompt(number, tokens[-room:], options, f"{identity} {copies[identity]}"))
            copies[identity] += 1
            count.truncated += len(tokens) > room
            count.forward_tokens += len(prompts[-1].tokens)
        texts: list[str | None] = [None] * len(requests)
        for batch in self._own_batches(prompts):
            for prompt, text in zip(batch, self._generate(batch), strict=True):
                texts[prompt.number] = text
        if self.world is not None and self.world.group is not None and not is_shared(self.model):
            parts: list[list[str | None]] = [[] for _ in range(self.world.size)]
            dist.all_gather_object(parts, texts, group=self.world.group)
            texts = [next(each for each in answers if each is not None) for answers in zip(*parts, strict=True)]
        return [text for text in texts if text is not None]

    def _score(
        self, asked: list[Request], kind: str, *, greedy: bool
    ) -> Iterator[tuple[tuple[float, ...], tuple[bool, ...]]]:
        report = score_sharing_prefixes(
            self.model,
            asked,
            greedy=greedy,
            batch_tokens=self.batch_tokens,
            precision=self.precision,
            world=self.world,
            min_prefix=self.min_prefix,
        )
        count = self.counts.setdefault(kind, RequestCount())
        count.requests += len(asked)
        count.truncated += report.num_truncated
        count.forward_tokens += report.num_forward_tokens
        for each in report.scores:
            if any(map(math.isnan, each.log_probs)):  # lm-eval would choose among them all the same
                raise ValueError("log-probabilities hold NaN: the model has diverged; take an earlier checkpoint")
            yield each.log_probs, each.greedy or ()

    def _generation_options(self, given: dict[str, Any]) -> _Options:
        """Raises ValueError for options that decoding does not support, and if no room is left for a context."""
        default = min(_MAX_NEW_TOKENS, self.max_length // 2)
        options = {name: value for name, value in normalize_gen_kwargs(given, default).items() if value is not None}
        unknown = sorted(options.keys() - _GENERATION_OPTIONS)
        if unknown:
            raise ValueError(
                f"the task's generation_kwargs hold {', '.join(unknown)}, not supported here; supported are: "
                f"{', '.join(sorted(_GENERATION_OPTIONS))}"
            )
        if options["max_gen_toks"] >= self.max_length:
            raise ValueError(
                f"the task generates up to {options['max_gen_toks']} tokens, which leaves no room for a context in "
                f"model.max_seq_len ({self.max_length}); set the task's max_gen_toks below it"
            )
        return _Options(
            options["max_gen_toks"],
            tuple(stop for stop in options["until"] if stop),
            float(options.get("temperature", 1.0)) if options["do_sample"] else 0.0,
            float(options.get("top_p", 1.0)),
        )

    def _own_batches(self, prompts: list[_Prompt]) -> Iterator[list[_Prompt]]:
        """Prompts with equal options and similar lengths, longest first; sampled ones alone, with a generator each."""
        batches: list[list[_Prompt]] = []
        for options in sorted({prompt.options for prompt in prompts}):
            members = [prompt for prompt in prompts if prompt.options == options]
            members.sort(key=lambda prompt: (-len(prompt.tokens), prompt.tokens, prompt.identity))
            size = max(1, self.batch_tokens // (len(members[0].tokens) + options.max_new_tokens))
            if options.temperature > 0 or drops_tokens(self.model):
                size = 1
            batches += [members[begin : begin + size] for begin in range(0, len(members), size)]
        if self.world is None or is_shared(self.model):
            yield from batches
        else:
            yield from batches[self.world.rank :: self.world.size]

    def _generate(self, batch: list[_Prompt]) -> list[str]:
        options = batch[0].options
        texts = [StoppedText(self.text_tokenizer, options.until) for _ in batch]
        pieces: list[list[str]] = [[] for _ in batch]

        def ended(row: int, token: int) -> bool:
            pieces[row].append(texts[row].add(token))
            return texts[row].stopped

        generate(
            self.model,
            [prompt.tokens for prompt in batch],
            options.max_new_tokens,
            eos_id=self.end_ids,
            temperature=options.temperature,
            top_p=options.top_p,
            # draws depend on the request, not on its position
            seed=int.from_bytes(hashlib.sha256(batch[0].identity.encode()).digest()[:4], "big"),
            ended=ended,
            world=self.world if is_shared(self.model) else None,
        )
        return ["".join([*found, text.finish()]) for found, text in zip(pieces, texts, strict=True)]

    def request_counts(self) -> dict[str, dict[str, int]]:
        """`counts` as plain values."""
        return {kind: asdict(count) for kind, count in sorted(self.counts.items())}


def _beginning(texts: tuple[str, str] | None) -> str:
    """The start of a continuation, for error messages."""
    return "unknown text" if texts is None else repr(texts[1][:60])
