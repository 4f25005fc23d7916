"""How line breaks become tokens: data.text_format.

plain    a line break is ordinary text
fairseq  a line break is the separator </s>, as in the papers' corpora: one paragraph per line, and one more separator
         after each document (Artetxe et al. 2021, Lin et al. 2021); the model never sees a line break token

In the public code, the second format is an option of the scorer. Its documented spelling, `replace_newlines_with_eos`,
is ignored without an error: the line breaks stay, and every score is that of a different text. Here the format is a
property of the corpus and of the checkpoint, and the tokenizer from `open_tokenizer` or `load_tokenizer` applies it.
"""

from __future__ import annotations

from pathlib import Path

from moe.data.tokenizer_interface import StreamDecoder, Tokenizer


class FairseqText:
    """A tokenizer that encodes line breaks as separators. Each line is encoded alone; `decode` restores the breaks.

    Generation stops at the separator, so with this format it stops at a line break, as in the papers' protocol.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self.bos_id = tokenizer.bos_id
        self.begin_id = tokenizer.begin_id
        self.fallback_ids = tokenizer.fallback_ids
        self.lossless = tokenizer.lossless
        self.hash = tokenizer.hash  # each id still stands for the same text

    def encode(self, text: str) -> list[int]:
        """Token ids, with a separator for each line break and none at the end."""
        return self._join([self._tokenizer.encode(line) for line in text.split("\n")])

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` each text, in the library's own threads."""
        lines = [text.split("\n") for text in texts]
        encoded = iter(self._tokenizer.encode_batch([line for group in lines for line in group], num_threads))
        return [self._join([next(encoded) for _ in group]) for group in lines]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, with a line break for each separator."""
        lines: list[list[int]] = [[]]
        for token in tokens:
            if token == self.eos_id:
                lines.append([])
            else:
                lines[-1].append(token)
        return "\n".join(self._tokenizer.decode(line) for line in lines)

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)

    def save(self, folder: Path) -> list[Path]:
        """Write the tokenizer's own files. The format is recorded in the configuration beside them."""
        return self._tokenizer.save(folder)

    def _join(self, lines: list[list[int]]) -> list[int]:
        first, *others = lines
        return first + [token for line in others for token in (self.eos_id, *line)]


def document_text(text: str, text_format: str) -> str:
    """`text` in the form that is encoded. With fairseq: one paragraph per line, no empty lines, a final line break.

    So the document's separator follows that of its last line, as in the papers' files, where documents are separated
    by an empty line.
    """
    if text_format == "plain":
        return text
    # str.splitlines would also split at U+2028 and other characters, which are text here
    return "".join(f"{line}\n" for line in text.replace("\r\n", "\n").split("\n") if line.strip())
