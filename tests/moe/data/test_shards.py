from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moe.data.shards import ShardWriter, TokenShard, token_dtype


def write(folder: Path, vocab_size: int = 100, dtype: str | None = None) -> Path:
    writer = ShardWriter(folder, vocab_size=vocab_size, tokenizer_hash="abc", dtype=dtype)
    writer.add("docs", [5, 6, 0], 10)
    writer.add("code", [7, 0], 4)
    writer.add("docs", [8, 9, vocab_size - 1, 0], 12)
    writer.finish()
    return folder


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (2**16, "uint16"), (2**16 + 1, "uint32")])
def test_everything_comes_back(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    shard = TokenShard(write(tmp_path / "s", vocab_size))
    assert shard.tokens.dtype == np.dtype(dtype) == np.dtype(token_dtype(vocab_size))
    assert shard.tokens.tolist() == [5, 6, 0, 7, 0, 8, 9, vocab_size - 1, 0]
    assert shard.domains == ["code", "docs"]
    assert shard.documents_of("docs").tolist() == [0, 2]
    assert shard.document(0).tolist() == [5, 6, 0]
    assert shard.document(2).tolist() == [8, 9, vocab_size - 1, 0]
    assert shard.document_bytes.tolist() == [10, 4, 12]
    assert (shard.num_tokens, shard.num_bytes, shard.tokenizer_hash) == (9, 26, "abc")


def test_tokens_are_mapped_not_read(tmp_path: Path) -> None:
    assert isinstance(TokenShard(write(tmp_path / "s")).tokens, np.memmap)


@pytest.mark.parametrize("name", ["tokens.bin", "documents.npy"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "delete"])
def test_damage_is_named_with_the_way_out(tmp_path: Path, name: str, damage: str) -> None:
    file = write(tmp_path / "corpus" / "train") / name
    content = bytearray(file.read_bytes())
    if damage == "truncate":
        file.write_bytes(content[:-1])
    elif damage == "flip":
        content[-2] ^= 4
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(ValueError, match=rf"{name} is damaged: sha256 .* delete {tmp_path}/corpus and run"):
        TokenShard(tmp_path / "corpus" / "train")


def test_a_folder_without_meta_is_no_shard(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a token shard"):
        TokenShard(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_meta_is_named(tmp_path: Path, content: str) -> None:
    (write(tmp_path / "corpus" / "train") / "meta.json").write_text(content)
    with pytest.raises(ValueError, match=rf"meta\.json is damaged \(.*delete {tmp_path}/corpus and run"):
        TokenShard(tmp_path / "corpus" / "train")


def test_another_format_is_refused(tmp_path: Path) -> None:
    meta = write(tmp_path / "s") / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has shard format 99, not 1"):
        TokenShard(tmp_path / "s")


def test_a_vocabulary_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a vocabulary of 70000 does not fit uint16, whose largest id is 65535"):
        write(tmp_path / "s", 70_000, "uint16")
