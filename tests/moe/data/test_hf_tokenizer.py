"""Tokenizers in Hugging Face's files, against the libraries that wrote them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moe.data.hf_tokenizer import HFTokenizer
from moe.data.tokenizer import open_tokenizer, tokenizer_files
from tests.shared_data import shared_data

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")

TEXT = ["the cat sat on the mat. a model of experts; dense and sparse layers learn.", "def f(x):\n    return x"] * 20
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
AWKWARD = ["", " ", "\n\n", "  two  ", "\ttab", "漢字 🙂", "</s> and <s>", "don 't , stop ."]


def byte_level(vocab_size: int = 400) -> Any:
    """GPT-2's kind of tokenizer with the ids of OPT's special tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def write_opt_layout(folder: Path, made: Any, **settings: object) -> Path:
    """vocab.json, merges.txt and the settings: what OPT's public folders hold."""
    made.model.save(str(folder))
    opt = {"bos_token": {"content": "</s>", "__type": "AddedToken"}, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(opt | {"unk_token": "</s>", "add_bos_token": True, "tokenizer_class": "GPT2Tokenizer"} | settings)
    )
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """tokenizer.json with its settings."""
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}, "bos_token": "<s>"}')
    return tmp_path


def test_tokenizer_json(folder: Path) -> None:
    made, opened = byte_level(), open_tokenizer(folder)
    assert isinstance(opened, HFTokenizer)
    assert (opened.bos_id, opened.eos_id, opened.vocab_size) == (0, 2, made.get_vocab_size())
    assert opened.lossless
    for text in [*AWKWARD[:6], AWKWARD[7], *TEXT[:2]]:
        assert opened.encode(text) == made.encode(text).ids
        assert opened.decode(opened.encode(text)) == text
    assert opened.encode_batch(AWKWARD, 1) == [opened.encode(text) for text in AWKWARD]


def test_special_words_are_text_and_decode_to_nothing(folder: Path) -> None:
    opened = open_tokenizer(folder)
    assert byte_level().encode("the </s>").ids[-1] == 2  # what the library does when nobody says otherwise
    assert not {0, 1, 2, 3}.intersection(opened.encode("the </s> <s> <pad> <unk>"))
    assert opened.decode(opened.encode("the </s>")) == "the </s>"
    assert opened.decode([0, *opened.encode("the cat"), 2]) == "the cat"


def test_opts_files(tmp_path: Path) -> None:
    """No tokenizer.json; </s> (2) before a text and behind it."""
    made = byte_level()
    opened = open_tokenizer(write_opt_layout(tmp_path, made))
    assert (opened.bos_id, opened.eos_id, opened.vocab_size) == (2, 2, made.get_vocab_size())
    for text in [*AWKWARD[:6], AWKWARD[7], *TEXT[:2]]:
        assert opened.encode(text) == made.encode(text).ids
        assert opened.decode(opened.encode(text)) == text
    assert not {0, 1, 2, 3}.intersection(opened.encode("the </s> <pad>"))


def test_a_prefix_space_is_taken_from_the_settings(tmp_path: Path) -> None:
    opened = open_tokenizer(write_opt_layout(tmp_path, byte_level(), add_prefix_space=True), allow_lossy=True)
    assert opened.encode("cat") == byte_level().encode(" cat").ids


def test_added_tokens_keep_their_ids(tmp_path: Path) -> None:
    made = byte_level()
    folder, size = write_opt_layout(tmp_path, made), made.get_vocab_size()
    (folder / "added_tokens.json").write_text(json.dumps({"<b>": size + 1, "<a>": size}))
    assert open_tokenizer(folder).vocab_size == size + 2
    assert open_tokenizer(folder).encode("<b>") == [size + 1]
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": size + 5}))
    with pytest.raises(ValueError, match=rf"added_tokens\.json gives '<a>' the id {size + 5}, which is not free"):
        open_tokenizer(folder)


@pytest.mark.parametrize("layout", ["json", "opt"])
def test_it_is_saved_byte_for_byte_and_opened(layout: str, tmp_path: Path, folder: Path) -> None:
    source = folder
    if layout == "opt":
        source = tmp_path / "opt"
        source.mkdir()
        write_opt_layout(source, byte_level())
    opened, copy = open_tokenizer(source), tmp_path / "copy"
    copy.mkdir()
    written = opened.save(copy)
    assert sorted(path.name for path in written) == sorted(tokenizer_files(copy)) == sorted(tokenizer_files(source))
    assert all(path.read_bytes() == (source / path.name).read_bytes() for path in written)
    assert open_tokenizer(copy).hash == opened.hash


def test_the_hash_is_of_what_decides_the_ids(folder: Path) -> None:
    before = open_tokenizer(folder).hash
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=4))
    assert open_tokenizer(folder).hash == before  # other spaces in the file
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<pad>", "bos_token": "<s>"}')
    assert open_tokenizer(folder).hash != before


def test_the_hash_of_gpt2s_files_is_of_what_decides_the_ids_too(tmp_path: Path) -> None:
    """A prefix space and added tokens give other ids: a corpus prepared with them is another corpus."""
    made, hashes = byte_level(), set()
    for name, settings in (("plain", {}), ("prefix", {"add_prefix_space": True}), ("added", {})):
        folder = tmp_path / name
        folder.mkdir()
        write_opt_layout(folder, made, **settings)
        if name == "added":
            (folder / "added_tokens.json").write_text(json.dumps({"the cat": made.get_vocab_size()}))
        hashes.add(open_tokenizer(folder, allow_lossy=True).hash)
    assert len(hashes) == 3


def test_a_file_is_opened_with_the_settings_beside_it(folder: Path) -> None:
    assert open_tokenizer(folder / "tokenizer.json").hash == open_tokenizer(folder).hash
    (folder / "tokenizer.json").rename(folder / "other.json")
    assert open_tokenizer(folder / "other.json").bos_id == 0


def test_streaming_joins_to_the_text(folder: Path) -> None:
    opened, text = open_tokenizer(folder), "the cat 漢字 sat 🙂 on  the mat"
    decoder = opened.stream_decoder()
    pieces = [decoder.add(token) for token in opened.encode(text)]
    assert "".join(pieces) + decoder.finish() == text
    assert all("\ufffd" not in piece for piece in pieces)


def begun(folder: Path, before: str, after: str = "", **settings: object) -> Path:
    """`folder`, whose post-processor puts tokens before a text and behind it."""
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=[(name, SPECIALS.index(name)) for name in SPECIALS]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "bos_token": "<s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | settings))
    return folder


@pytest.mark.parametrize(("before", "after"), [("<s>", ""), ("<s>", "</s>"), ("<pad>", ""), ("</s>", ""), ("", "</s>")])
def test_a_text_begins_as_in_transformers_or_with_the_separator(before: str, after: str, folder: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    opened = open_tokenizer(begun(folder, before, after))
    first = transformers.AutoTokenizer.from_pretrained(folder)("the").input_ids[0]
    assert opened.begin_id == (first if before else opened.eos_id)
    assert first == (SPECIALS.index(before) if before else opened.encode("the")[0])
    assert opened.encode("the") == byte_level().encode("the").ids  # encode adds nothing


def test_the_setting_says_what_begins_a_text(folder: Path, tmp_path: Path) -> None:
    assert open_tokenizer(folder).begin_id == 2  # no post-processor: the separator
    assert open_tokenizer(begun(folder, "<s>", add_bos_token=False)).begin_id == 2
    assert open_tokenizer(begun(folder, "", add_bos_token=True)).begin_id == 0
    assert open_tokenizer(begun(folder, "<s>", add_bos_token=True, bos_token=None)).begin_id == 0
    with pytest.raises(ValueError, match=r"puts 2 tokens before a text \(ids 1, 0\).*\"add_bos_token\": true"):
        open_tokenizer(begun(folder, "<pad> <s>"))
    assert open_tokenizer(begun(folder, "<pad> <s>", add_bos_token=True)).begin_id == 0
    opt = tmp_path / "opt"
    opt.mkdir()
    assert open_tokenizer(write_opt_layout(opt, byte_level())).begin_id == 2  # its bos_token is </s>
    assert open_tokenizer(write_opt_layout(opt, byte_level(), bos_token="<s>")).begin_id == 0


def test_the_separator_must_be_known(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    settings.unlink()
    assert open_tokenizer(folder).eos_id == 2  # the only one of the usual names
    settings.write_text('{"eos_token": "<end>"}')
    with pytest.raises(ValueError, match="names '<end>' as its eos_token, but its vocabulary lacks it"):
        open_tokenizer(folder)
    settings.unlink()
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"</s>"', '"<stop>"'))
    with pytest.raises(ValueError, match=r"does not say which token separates documents .*tokenizer_config\.json"):
        open_tokenizer(folder)


def test_damaged_files_are_named(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json holds a list, not an object"):
        open_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "#version: 0.2\nqq zz\n", r"vocab\.json and merges\.txt are not GPT-2's format: .*qq"),
        ("vocab.json", '{"a": "x"}', r"vocab\.json and merges\.txt are not GPT-2's format"),
        ("tokenizer_config.json", '{"eos_token": 5}', r"eos_token \(5\) must be text"),
        ("tokenizer_config.json", '{"pad_token": ["a"]}', r"pad_token \(\['a'\]\) must be text"),
    ],
)
def test_damaged_files_of_opts_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (write_opt_layout(tmp_path, byte_level()) / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        open_tokenizer(tmp_path)


def test_merges_with_the_line_ends_of_windows(tmp_path: Path) -> None:
    merges = write_opt_layout(tmp_path, byte_level()) / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", b"\r\n"))
    assert open_tokenizer(tmp_path).encode(TEXT[0]) == byte_level().encode(TEXT[0]).ids


def test_it_equals_transformers_over_declarations_in_many_languages(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra 'hf'")
    write_opt_layout(tmp_path, byte_level())
    theirs, ours = transformers.GPT2Tokenizer.from_pretrained(tmp_path), open_tokenizer(tmp_path)
    with gzip.open(shared_data("udhr") / "udhr.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file][::4]
    assert len(texts) > 100
    for text in texts:
        assert ours.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ours.encode(text)) == text
