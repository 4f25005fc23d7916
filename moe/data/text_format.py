"""How line breaks become tokens: data.text_format.

plain    a line break is text like any other
fairseq  a line break is the separator </s>, as in the papers' corpora: one paragraph a line, and one more separator
         after a document (Artetxe et al. 2021, Lin et al. 2021); no line break token is ever seen

In public code the second is an option of the scorer whose documented spelling, `replace_newlines_with_eos`, is
swallowed without an error: the line breaks stay, and every score is that of another text. Here the
format belongs to the corpus and the checkpoint, and the tokenizer that `open_tokenizer` and `load_tokenizer` return
does it.
"""

from __future__ import annotations

from pathlib import Path

from moe.data.tokenizer_interface import StreamDecoder, Tokenizer


class FairseqText:
    """A tokenizer whose line breaks are separators: each line is encoded alone, and `decode` gives the breaks back.

    Generation, which ends at the separator, ends at a line break then, as in the papers' protocol.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.vocab_size = tokenizer.vocab_size
        self.eos_id = tokenizer.eos_id
        self.bos_id = tokenizer.bos_id
        self.begin_id = tokenizer.begin_id
        self.fallback_ids = tokenizer.fallback_ids
        self.lossless = tokenizer.lossless
        self.hash = tokenizer.hash  # the ids stand for the same text

    def encode(self, text: str) -> list[int]:
        """Token ids; a separator for each line break, none at the end."""
        return self._join([self._tokenizer.encode(line) for line in text.split("\n")])

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` of each text, in threads of the library's own."""
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
        """A decoder to feed one token at a time."""
        return StreamDecoder(self)

    def save(self, folder: Path) -> list[Path]:
        """Write the tokenizer's own files: the format is in the configuration beside them."""
        return self._tokenizer.save(folder)

    def _join(self, lines: list[list[int]]) -> list[int]:
        first, *others = lines
        return first + [token for line in others for token in (self.eos_id, *line)]


def document_text(text: str, text_format: str) -> str:
    """`text` as it is encoded. With fairseq: a paragraph a line, no empty lines, a line break at the end.

    The separator after the document then follows the one of its last line, as in the papers' files, where an empty
    line stands between documents.
    """
    if text_format == "plain":
        return text
    # not splitlines: it splits at U+2028 and others, which are text
    return "".join(f"{line}\n" for line in text.replace("\r\n", "\n").split("\n") if line.strip())
