"""Text from prompts: stop strings never leak, and no piece ends in half a character."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

from moe.data.tokenizer import Tokenizer
from moe.distributed.world import World
from moe.generation.beam import beam_search
from moe.generation.tokens import generate, stream
from moe.model import Transformer


class StoppedText:
    """Incrementally decoded text, cut before the first `stop` string that is complete.

    Text that might begin a stop string is held back until it is known not to. The result does not depend on how the
    text is split into tokens. Raises ValueError for an empty stop string, and for a string in place of a list of them.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str):
            raise ValueError(
                f"stop ({stop!r}) must be a list of strings, or each of its characters would end the text: write "
                f"[{stop!r}]"
            )
        if not all(stop):
            raise ValueError(f"stop ({list(stop)}) holds an empty string, which every text contains: leave it out")
        self._decoder = tokenizer.stream_decoder()
        self._stop = stop
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that `token` makes final; may be empty."""
        return self._take(self._decoder.add(token))

    def finish(self) -> str:
        """The text held back so far, once there are no more tokens."""
        text = self._take(self._decoder.finish())
        text, self._held = text + self._held, ""
        return text

    def _take(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        places = [(place + len(stop), place) for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped, self._held = True, ""
            return text[: min(places)[1]]
        keep = self._beginning(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _beginning(self, text: str) -> int:
        """Length of the longest suffix of `text` that is a proper prefix of a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return length
        return 0


def continue_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    num_beams: int = 1,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    end_ids: Collection[int] | None = None,
    world: World | None = None,
) -> list[str]:
    """Return the continuation of each prompt as text, up to the first `stop` string.

    A prompt begins a document, so `tokenizer.begin_id` is prepended. end_ids: the tokens that end a text, such as
    `find_end_ids` returns; `None` is `tokenizer.eos_id` alone. num_beams > 1 selects beam search (for its options
    see `moe.generation.beam`). Raises ValueError for num_beams > 1 combined with sampling, and for whatever `stream`
    refuses.
    """
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    if num_beams > 1 and (temperature != 0.0 or top_p != 1.0):
        raise ValueError(
            f"num_beams ({num_beams}) asks for beam search, and temperature ({temperature}) or top_p ({top_p}) for "
            f"sampling: set temperature=0 and top_p=1 to search, or num_beams=1 to sample"
        )
    if num_beams != 1:
        options: dict[str, Any] = {
            "num_beams": num_beams,
            "length_penalty": length_penalty,
            "early_stopping": early_stopping,
            "eos_id": tokenizer.eos_id if end_ids is None else end_ids,
        }
        return _search(model, tokenizer, tokens, max_new_tokens, stop, world, **options)
    texts = [StoppedText(tokenizer, stop) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]

    def ended(row: int, token: int) -> bool:
        pieces[row].append(texts[row].add(token))
        return texts[row].stopped

    generate(
        model,
        tokens,
        max_new_tokens,
        eos_id=tokenizer.eos_id if end_ids is None else end_ids,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ended=ended,
        world=world,
    )
    return ["".join([*found, text.finish()]) for found, text in zip(pieces, texts, strict=True)]


def _search(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    world: World | None,
    **options: Any,
) -> list[str]:
    """The best beam of each prompt, up to the first `stop` string."""

    def stops(row: int, new: list[int]) -> bool:
        return _stopped(tokenizer, new, stop)[1]

    found = beam_search(
        model,
        prompts,
        max_new_tokens,
        ended=stops if stop else None,
        world=world,
        **options,
    )
    return [_stopped(tokenizer, beams[0].tokens, stop)[0] for beams in found]


def stream_text(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Sequence[str] = (),
    end_ids: Collection[int] | None = None,
) -> Iterator[str]:
    """Yield the continuation of one prompt piece by piece: no partial characters, and nothing of a stop string.

    The arguments are those of `continue_texts`.
    """
    text = StoppedText(tokenizer, stop)
    piece = ""

    def ended(row: int, token: int) -> bool:
        nonlocal piece
        piece = text.add(token)
        return text.stopped

    for _ in stream(
        model,
        [encode_prompt(tokenizer, prompt)],
        max_new_tokens,
        eos_id=tokenizer.eos_id if end_ids is None else end_ids,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        ended=ended,
    ):
        yield piece
    yield text.finish()


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The token that begins a document, followed by the prompt's tokens."""
    return [tokenizer.begin_id, *tokenizer.encode(prompt)]


def _stopped(tokenizer: Tokenizer, tokens: list[int], stop: Sequence[str]) -> tuple[str, bool]:
    """The text of `tokens` up to the first stop string, and whether one was found."""
    text = StoppedText(tokenizer, stop)
    pieces = [text.add(token) for token in tokens]
    return "".join([*pieces, text.finish()]), text.stopped
