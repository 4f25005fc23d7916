"""Opens a tokenizer of any kind from a file or a folder. docs/tokenizers.md lists the kinds and their files."""

from __future__ import annotations

from pathlib import Path

from moe.data import hf_tokenizer
from moe.data.hf_tokenizer import HFTokenizer
from moe.data.sentencepiece_tokenizer import SentencePieceTokenizer, train_tokenizer
from moe.data.text_format import FairseqText
from moe.data.tokenizer_interface import StreamDecoder, Tokenizer
from moe.data.xglm_tokenizer import XGLMTokenizer

__all__ = ["StreamDecoder", "Tokenizer", "open_tokenizer", "tokenizer_files", "train_tokenizer"]

FILES = (SentencePieceTokenizer.FILE, XGLMTokenizer.FILE, *hf_tokenizer.FILES)


def open_tokenizer(path: Path | str, *, text_format: str = "plain", allow_lossy: bool = False) -> Tokenizer:
    """Open the tokenizer in a file or folder.

    file: *.json is Hugging Face's, sentencepiece.bpe.model XGLM's, and any other name a sentencepiece model with its
    own ids. folder: decided by its files, in the order XGLM, Hugging Face, sentencepiece. text_format:
    data.text_format. Raises ValueError if there is none, if it is damaged, or, without `allow_lossy`, if it changes
    text.
    """
    if text_format not in ("plain", "fairseq"):
        raise ValueError(f"data.text_format ({text_format!r}) must be one of: plain, fairseq")
    path = Path(path).expanduser()
    if not path.exists():
        raise ValueError(f"tokenizer {path} does not exist")
    tokenizer = _open_folder(path) if path.is_dir() else _open_file(path)
    if not tokenizer.lossless and not allow_lossy:
        probe = "A  line,\n    another; and 漢字."
        raise ValueError(
            f"tokenizer {path} changes text ({tokenizer.decode(tokenizer.encode(probe))!r} for {probe!r}). To use it "
            f"as it is, set data.allow_lossy_tokenizer=true; to keep the text, train a sentencepiece model with "
            f"byte_fallback=true, normalization_rule_name=identity, add_dummy_prefix=false and "
            f"remove_extra_whitespaces=false"
        )
    return FairseqText(tokenizer) if text_format == "fairseq" else tokenizer


def tokenizer_files(folder: Path) -> list[str]:
    """The names of the tokenizer's files in a folder."""
    return [name for name in FILES if (folder / name).is_file()]


def _open_file(path: Path) -> Tokenizer:
    if path.suffix == ".json":
        return HFTokenizer.load(path)
    if path.name == XGLMTokenizer.FILE:
        return XGLMTokenizer.load(path)
    return SentencePieceTokenizer.load(path)


def _open_folder(folder: Path) -> Tokenizer:
    names = tokenizer_files(folder)
    kind = _kind(folder) if XGLMTokenizer.FILE in names else ""
    if kind.startswith("XGLM"):
        return XGLMTokenizer.load(folder / XGLMTokenizer.FILE)
    if hf_tokenizer.JSON in names or {hf_tokenizer.VOCABULARY, hf_tokenizer.MERGES} <= set(names):
        return HFTokenizer.load(folder)
    if SentencePieceTokenizer.FILE in names:
        return SentencePieceTokenizer.load(folder / SentencePieceTokenizer.FILE)
    if kind:
        raise ValueError(
            f"{folder / XGLMTokenizer.FILE} belongs to a {kind}, whose ids differ from XGLM's; give its tokenizer.json"
        )
    raise ValueError(f"{folder} holds no tokenizer: none of {', '.join(FILES)}")


def _kind(folder: Path) -> str:
    """The tokenizer class named in the folder's settings; XGLM's without settings, as in our own checkpoints."""
    name = "tokenizer_config.json"
    settings = hf_tokenizer.json_object((folder / name).read_bytes(), name, folder) if (folder / name).exists() else {}
    return str(settings.get("tokenizer_class", "XGLMTokenizer"))
