"""A checkpoint carries the files of whichever tokenizer it has, and opens it in the format it was trained with."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece

from moe.checkpoint import TrainState, consolidate, find_checkpoint, load_tokenizer, save_checkpoint, verify_checkpoint
from moe.compose import to_yaml
from moe.config import RunConfig
from moe.data.text_format import FairseqText
from moe.data.tokenizer import Tokenizer, open_tokenizer, tokenizer_files, train_tokenizer
from moe.data.xglm_tokenizer import XGLMTokenizer
from moe.model import Transformer

TEXT = "the cat sat on the mat. a model of experts " * 30


def make(kind: str, folder: Path) -> Tokenizer:
    """A tokenizer of a kind, as its makers would bring it."""
    folder.mkdir()
    if kind == "sentencepiece":
        return train_tokenizer([TEXT], 290)
    if kind == "xglm":
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT]), model_writer=model, vocab_size=50, hard_vocab_limit=False, minloglevel=2
        )
        return XGLMTokenizer(model.getvalue())
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra 'hf'")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT], vocab_size=300, special_tokens=["<s>", "<pad>", "</s>"], show_progress=False)
    made.save(str(folder / "tokenizer.json")) if kind in ("json", "llama") else made.save_model(str(folder))
    names = (
        {"eos_token": "</s>", "bos_token": "</s>"} if kind != "llama" else {"bos_token": "<s>", "add_bos_token": True}
    )
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"} | names))
    return open_tokenizer(folder)


@pytest.mark.parametrize("text_format", ["plain", "fairseq"])
@pytest.mark.parametrize("kind", ["sentencepiece", "xglm", "json", "opt", "llama"])
def test_any_tokenizer_goes_through_a_checkpoint(
    kind: str, text_format: str, config: RunConfig, tmp_path: Path
) -> None:
    tokenizer = make(kind, tmp_path / "original")
    if text_format == "fairseq":
        tokenizer = FairseqText(tokenizer)
    config = replace(
        config,
        data=replace(config.data, text_format=text_format),
        model=replace(config.model, vocab_size=tokenizer.vocab_size),
    )
    save_checkpoint(
        tmp_path / "run",
        model=Transformer(config.model),
        optimizer=None,
        state=TrainState(step=1),
        config_yaml=to_yaml(config),
        tokenizer=tokenizer,
        keep_last=1,
    )
    checkpoint = find_checkpoint(tmp_path / "run")
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    assert checksums.keys() >= set(tokenizer_files(checkpoint)) != set()
    weights = consolidate(checkpoint, tmp_path / "weights")
    verify_checkpoint(weights)
    assert tokenizer_files(weights) == tokenizer_files(checkpoint)
    for place in (checkpoint, weights):
        loaded = load_tokenizer(place)
        text = "the cat\nsat on"
        assert (loaded.hash, loaded.eos_id, loaded.bos_id) == (tokenizer.hash, tokenizer.eos_id, tokenizer.bos_id)
        assert loaded.begin_id == tokenizer.begin_id == (loaded.bos_id if kind == "llama" else loaded.eos_id)
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode(text).count(loaded.eos_id) == (text_format == "fairseq")
    # a run that starts from it names the checkpoint as its tokenizer
    assert open_tokenizer(checkpoint, allow_lossy=True).hash == tokenizer.hash
