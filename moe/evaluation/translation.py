"""Few-shot translation: some translated pairs, then a source for which the model writes the target.

XGLM's prompt is `{source} = {target}`, with the end-of-text token between pairs; the model writes until
it ends the text or a line. Demonstrations and queries are tokenized separately, so a prompt's tokens do not depend on
their neighbours.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.evaluation.parallel_text import ParallelText
from moe.evaluation.shared_prefixes import drops_tokens, is_shared
from moe.generation import StoppedText, beam_search, generate
from moe.model import Transformer

TEMPLATES = {
    "xglm": "{source} = {target}",
    "named": "{source_language}: {source} = {target_language}: {target}",  # languages are given by their codes
}
BATCH_TOKENS = 8192  # positions per batch, prompts and generated tokens together


@dataclass(frozen=True)
class TranslationProtocol:
    """How prompts are built and translations generated."""

    template: str = TEMPLATES["xglm"]
    num_shots: int = 32
    separator: str = "end"  # between pairs: "end", the end-of-text token, or "line", a line break
    max_new_tokens: int = 256
    num_beams: int = 1
    length_penalty: float = 1.0
    seed: int = 0  # for the demonstrations

    def __post_init__(self) -> None:
        if self.template.count("{target}") != 1 or self.template.count("{source}") != 1:
            raise ValueError(f"template ({self.template!r}) must hold {{source}} and {{target}} once each")
        if not self.template.endswith("{target}"):
            raise ValueError(f"template ({self.template!r}) must end with {{target}}, which the model is to write")
        try:
            self.template.format(source="", target="", source_language="", target_language="")
        except (LookupError, ValueError) as error:
            raise ValueError(
                f"template ({self.template!r}) may hold {{source}}, {{target}}, {{source_language}} and "
                f"{{target_language}}, and other braces doubled: {error}"
            ) from error
        if self.separator not in ("end", "line"):
            raise ValueError(f"separator ({self.separator!r}) must be one of: end, line")
        for name, least in (("num_shots", 0), ("max_new_tokens", 1), ("num_beams", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if self.num_beams == 1 and self.length_penalty != 1.0:
            raise ValueError(
                f"length_penalty ({self.length_penalty}) applies to beam search: set num_beams above 1, or leave it out"
            )


class Prompt(NamedTuple):
    """A query with its demonstrations, fitted to the model's length."""

    tokens: list[int]
    num_shots: int  # demonstrations that fit
    is_cut: bool  # whether the query itself was cut on the left


class Direction(NamedTuple):
    """All translations for one pair of languages."""

    source: str
    target: str
    hypotheses: list[str]
    references: list[str]
    num_shots: float  # demonstrations that fit, on average
    num_fewer: int  # prompts with fewer demonstrations than requested
    num_cut: int  # queries cut on the left
    num_unfinished: int  # translations ended by max_new_tokens


def make_prompts(
    text: ParallelText,
    source: str,
    target: str,
    tokenizer: Tokenizer,
    protocol: TranslationProtocol,
    max_seq_len: int,
    *,
    limit: int | None = None,
) -> list[Prompt]:
    """One prompt per line to translate, in order; only the first `limit`.

    Demonstrations are drawn anew for each query from one generator seeded once, so every direction shows the same
    lines. They are added until one does not fit beside the query and the new tokens; a query that is too long on its
    own is cut on the left. Raises ValueError if num_shots exceeds the lines to draw from, or if nothing fits.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit ({limit}) must be at least 1, or None for all lines")
    demos = text.demos[source]
    if protocol.num_shots > len(demos):
        raise ValueError(
            f"num_shots ({protocol.num_shots}) is more than the {len(demos)} lines to draw demonstrations from; lower "
            f"it, or raise demo_lines"
        )
    room = max_seq_len - protocol.max_new_tokens
    if room < 2:
        raise ValueError(
            f"max_new_tokens ({protocol.max_new_tokens}) leaves no room for a prompt in model.max_seq_len "
            f"({max_seq_len}); lower it"
        )
    names = {"source_language": source, "target_language": target}
    separator = [tokenizer.eos_id] if protocol.separator == "end" else tokenizer.encode("\n")
    pairs = [
        tokenizer.encode(protocol.template.format(source=one, target=other, **names)) + separator
        for one, other in zip(demos, text.demos[target], strict=True)
    ]
    # the space before the target is left to the model: most tokenizers attach it to the next word
    head = protocol.template.removesuffix("{target}").rstrip(" ")
    rng = random.Random(protocol.seed)
    prompts = []
    for line in text.test[source][:limit]:
        query = tokenizer.encode(head.format(source=line, **names))
        chosen = rng.sample(range(len(pairs)), protocol.num_shots)
        kept: list[int] = []
        length = 1 + len(query)  # 1 for the beginning token
        count = 0
        for index in chosen:
            if length + len(pairs[index]) > room:
                break
            kept += pairs[index]
            length += len(pairs[index])
            count += 1
        is_cut = 1 + len(query) > room
        tokens = [tokenizer.begin_id, *kept, *(query[1 + len(query) - room :] if is_cut else query)]
        prompts.append(Prompt(tokens, count, is_cut))
    return prompts


def translate(
    model: Transformer,
    tokenizer: Tokenizer,
    text: ParallelText,
    source: str,
    target: str,
    protocol: TranslationProtocol,
    *,
    limit: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    end_ids: Collection[int] | None = None,
    world: World | None = None,
) -> Direction:
    """Translate each line of text.test[source] into `target`, greedily or by beam search.

    end_ids: the tokens that end a translation; `None` is the tokenizer's `eos_id` alone.
    world: ranks that hold the model; all must call, and all get the full result. They take turns with the batches,
    which are the same for any number of ranks; ranks that share a model run every batch together.
    """
    prompts = make_prompts(text, source, target, tokenizer, protocol, model.config.max_seq_len, limit=limit)
    written: dict[int, tuple[str, bool]] = {}  # by line
    together = world is not None and is_shared(model)
    ends = {tokenizer.eos_id} if end_ids is None else end_ids
    batch_tokens = 1 if drops_tokens(model) else batch_tokens  # one by one: others would compete for the capacity
    for number, batch in enumerate(_batches(prompts, protocol.max_new_tokens, batch_tokens)):
        if world is None or together or number % world.size == world.rank:
            asked = [prompts[i].tokens for i in batch]
            found = _write(model, tokenizer, asked, protocol, ends, world if together else None)
            written |= zip(batch, found, strict=True)
    if world is not None and world.group is not None and not together:
        parts: list[dict[int, tuple[str, bool]]] = [{} for _ in range(world.size)]
        dist.all_gather_object(parts, written, group=world.group)
        written = {line: each for part in parts for line, each in part.items()}
    return Direction(
        source=source,
        target=target,
        hypotheses=[written[line][0] for line in range(len(prompts))],
        references=text.test[target][: len(prompts)],
        num_shots=sum(prompt.num_shots for prompt in prompts) / len(prompts),
        num_fewer=sum(prompt.num_shots < protocol.num_shots for prompt in prompts),
        num_cut=sum(prompt.is_cut for prompt in prompts),
        num_unfinished=sum(not finished for _, finished in written.values()),
    )


def _batches(prompts: Sequence[Prompt], max_new_tokens: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts of similar length, longest first: little padding, and out-of-memory shows at once."""
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].tokens))
    while order:
        count = max(1, batch_tokens // (len(prompts[order[0]].tokens) + max_new_tokens))
        yield order[:count]
        order = order[count:]


def _write(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    protocol: TranslationProtocol,
    end_ids: Collection[int],
    world: World | None,
) -> list[tuple[str, bool]]:
    """What the model writes after each prompt, up to the end of the line, and whether it stopped by itself."""
    stop = ["\n"]
    if protocol.num_beams == 1:
        texts = [StoppedText(tokenizer, stop) for _ in prompts]
        pieces: list[list[str]] = [[] for _ in prompts]
        counts = [0] * len(prompts)

        def ended(row: int, token: int) -> bool:
            pieces[row].append(texts[row].add(token))
            counts[row] += 1
            return texts[row].stopped

        generate(model, prompts, protocol.max_new_tokens, eos_id=end_ids, ended=ended, world=world)
        return [
            ("".join([*found, text.finish()]).strip(), text.stopped or count < protocol.max_new_tokens)
            for found, text, count in zip(pieces, texts, counts, strict=True)
        ]

    def line_ends(row: int, tokens: list[int]) -> bool:
        return "\n" in tokenizer.decode(tokens)

    beams = beam_search(
        model,
        prompts,
        protocol.max_new_tokens,
        num_beams=protocol.num_beams,
        eos_id=end_ids,
        length_penalty=protocol.length_penalty,
        ended=line_ends,
        world=world,
    )
    written = []
    for found in beams:
        text = tokenizer.decode(found[0].tokens)
        ends = "\n" in text or len(found[0].tokens) < protocol.max_new_tokens
        written.append((text.split("\n")[0].strip(), ends))
    return written
