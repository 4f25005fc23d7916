"""Tokenizers in Hugging Face's formats: tokenizer.json, or GPT-2's vocab.json and merges.txt, which OPT uses too."""

from __future__ import annotations

import hashlib
import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from moe.data.tokenizer_interface import StreamDecoder

JSON, VOCABULARY, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
ADDED = "added_tokens.json"
SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", ADDED)
FILES = (JSON, VOCABULARY, MERGES, *SETTINGS)
NAMED = ("eos_token", "bos_token", "pad_token", "unk_token")  # keys of the settings that name a token
_USUAL_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>")  # tried if the settings name no eos_token
_PROBE = "Text  with\ttabs,\n\n    spaces , don 't and 漢字."


class HFTokenizer:
    """A tokenizer of Hugging Face's `tokenizers` library. Keeps its files unchanged. Needs the extra `hf`."""

    def __init__(self, files: dict[str, bytes], origin: Path) -> None:
        self._files = files
        settings = _settings(files, origin)
        self._tokenizer = _build(files, settings, origin)
        end = settings.get("eos_token") or self._usual_end(origin)
        self.eos_id = self._special(end, "eos_token", origin)
        begin = settings.get("bos_token")
        self.bos_id = None if begin is None else self._special(begin, "bos_token", origin)
        names = {settings[key] for key in NAMED if settings.get(key)}
        # only tokens of the vocabulary: any other would be added under a new id
        self._tokenizer.add_special_tokens(
            sorted(name for name in names if self._tokenizer.token_to_id(name) is not None)
        )
        self._tokenizer.encode_special_tokens = True  # "</s>" in a text does not end the document
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.begin_id = self._beginning(settings.get("add_bos_token"), origin)
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        unknown = settings.get("unk_token")
        self.fallback_ids = frozenset(
            number for piece, number in vocabulary.items() if piece == unknown or _is_byte(piece)
        )
        content = json.dumps([*_deciding(files, settings), self.eos_id, self.bos_id], sort_keys=True)
        self.hash = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def load(cls, path: Path) -> HFTokenizer:
        """Read a folder, or a .json file with the settings beside it. Raises ValueError if a needed file is missing."""
        folder, chosen = (path, FILES) if path.is_dir() else (path.parent, (JSON, *SETTINGS))
        files = {name: (folder / name).read_bytes() for name in chosen if (folder / name).is_file()}
        if path.is_file():
            files[JSON] = path.read_bytes()
        return cls(files, path)

    @property
    def lossless(self) -> bool:
        return self.decode(self.encode(_PROBE)) == _PROBE

    def save(self, folder: Path) -> list[Path]:
        """Write the files that the tokenizer was read from, byte for byte."""
        for name, content in self._files.items():
            (folder / name).write_bytes(content)
        return [folder / name for name in self._files]

    def encode(self, text: str) -> list[int]:
        """Token ids, without separator and start token."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        """`encode` each text. `num_threads` has no effect: the library uses RAYON_NUM_THREADS."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(texts, add_special_tokens=False)]

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids; invalid UTF-8 becomes U+FFFD, special tokens become nothing."""
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def stream_decoder(self) -> StreamDecoder:
        """A decoder that takes one token at a time."""
        return StreamDecoder(self)

    def _beginning(self, add_bos_token: bool | None, origin: Path) -> int:
        """The token that precedes a text: by the setting if there is one, else by tokenizer.json's post-processor."""
        if add_bos_token is False:
            return self.eos_id
        if add_bos_token and self.bos_id is not None:
            return self.bos_id
        encoding = self._tokenizer.encode(_PROBE, add_special_tokens=True)
        added = list(takewhile(lambda each: each[1], zip(encoding.ids, encoding.special_tokens_mask, strict=True)))
        if len(added) > 1:
            raise ValueError(
                f"tokenizer {origin} puts {len(added)} tokens before a text (ids "
                f"{', '.join(str(number) for number, _ in added)}), but here a text begins with one. Choose it in "
                f'tokenizer_config.json with "bos_token" and "add_bos_token": true, or none with "add_bos_token": false'
            )
        return int(added[0][0]) if added else self.eos_id

    def _special(self, name: str, role: str, origin: Path) -> int:
        number = self._tokenizer.token_to_id(name)
        if number is None:
            raise ValueError(f"tokenizer {origin} names {name!r} as its {role}, but its vocabulary lacks it")
        return int(number)

    def _usual_end(self, origin: Path) -> str:
        found = [name for name in _USUAL_ENDS if self._tokenizer.token_to_id(name) is not None]
        if len(found) != 1:
            raise ValueError(
                f"tokenizer {origin} does not say which token separates documents (its vocabulary has "
                f'{found or "none of the usual ones"}); put {{"eos_token": "..."}} into a tokenizer_config.json '
                f"beside it"
            )
        return found[0]


def _build(files: dict[str, bytes], settings: dict[str, Any], origin: Path) -> Any:
    try:
        import tokenizers  # only these formats need it
    except ImportError as error:
        raise ValueError(f"tokenizer {origin} needs tokenizers: pip install -c constraints.txt '.[hf]'") from error
    if JSON in files:
        try:
            return tokenizers.Tokenizer.from_str(files[JSON].decode())
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f"tokenizer {origin} is not a tokenizer.json: {error}") from error
    if VOCABULARY not in files or MERGES not in files:
        raise ValueError(f"tokenizer {origin} holds neither {JSON} nor {VOCABULARY} with {MERGES}")
    vocabulary = json_object(files[VOCABULARY], VOCABULARY, origin)
    try:
        lines = files[MERGES].decode().replace("\r\n", "\n").split("\n")  # git for Windows writes \r\n
        pairs = (line.partition(" ") for line in lines[lines[0].startswith("#version") :])
        merges = [(left, right) for left, _, right in pairs if right]
        built = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"tokenizer {origin}: {VOCABULARY} and {MERGES} are not GPT-2's format: {error}") from error
    prefix = bool(settings.get("add_prefix_space", False))
    built.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    built.decoder = tokenizers.decoders.ByteLevel()
    added = json_object(files[ADDED], ADDED, origin) if ADDED in files else {}
    for name, number in sorted(added.items(), key=lambda item: item[1]):
        built.add_tokens([name])
        if built.token_to_id(name) != number:
            raise ValueError(f"tokenizer {origin}: {ADDED} gives {name!r} the id {number}, which is not free")
    return built


def _deciding(files: dict[str, bytes], settings: dict[str, Any]) -> list[Any]:
    """The content that determines the ids of a text. Unset options are left out, so that earlier hashes stay valid."""
    parts: list[Any] = [json.loads(files[name]) for name in (JSON, VOCABULARY) if name in files]
    if JSON in files:
        return parts
    parts.append(files[MERGES].decode())
    if settings.get("add_prefix_space", False):
        parts.append("add_prefix_space")
    if ADDED in files:
        parts.append(json.loads(files[ADDED]))
    return parts


def _settings(files: dict[str, bytes], origin: Path) -> dict[str, Any]:
    """Merge both settings files. A token may be given as text or as {"content": text}."""
    merged: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            merged |= {key: value for key, value in json_object(files[name], name, origin).items() if value is not None}
    plain = {
        key: value["content"] if isinstance(value, dict) and "content" in value else value
        for key, value in merged.items()
    }
    for key in NAMED:
        if not isinstance(plain.get(key, ""), str):
            raise ValueError(f"tokenizer {origin}: {key} ({plain[key]!r}) must be text, or null for none")
    return plain


def json_object(text: bytes, name: str, origin: Path) -> dict[str, Any]:
    """Parse a JSON object. Raises ValueError, with the file's name, for anything else."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"tokenizer {origin}: {name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"tokenizer {origin}: {name} holds a {type(content).__name__}, not an object")
    return content


def _is_byte(piece: str) -> bool:
    return len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
