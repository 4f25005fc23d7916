"""An imported model ends a text where transformers' generate does, and an export names the same ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe.checkpoint import load_model, load_tokenizer
from moe.checkpoint.folders import CHECKSUMS, sha256
from moe.cli import app
from moe.data.tokenizer import Tokenizer
from moe.generation import continue_texts, encode_prompt, find_end_ids, stream_text
from moe.interop.hf import from_hf, to_hf
from moe.interop.hf.folders import ORIGIN
from tests.moe.interop.hf_models import CASES, make_model

transformers = pytest.importorskip("transformers", reason="the oracle of generation is transformers' generate")

PROMPTS, NEW = ["the cat", "def main(", "", "1 2 3"], 24


@pytest.fixture
def llama(tokenizer: Tokenizer, tmp_path: Path) -> tuple[Path, list[int]]:
    """A folder with a small Llama and our tokenizer, and tokens that the model likes to write, as a list of ends."""
    case = CASES["llama"]
    before, case.options["vocab_size"] = case.options["vocab_size"], tokenizer.vocab_size
    try:
        model = make_model("llama", torch.float32)
    finally:
        case.options["vocab_size"] = before
    written = [_continue(model, tokenizer, prompt, [tokenizer.eos_id]) for prompt in PROMPTS]
    ends = [tokenizer.eos_id, *{row[6 + i] for i, row in enumerate(written)}]  # each meets one of them somewhere
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, bos_token_id=tokenizer.bos_id)
    model.config.eos_token_id = tokenizer.eos_id
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save(tmp_path / "theirs")
    return tmp_path / "theirs", ends


def _continue(
    theirs: Any, tokenizer: Tokenizer, prompt: str, ends: list[int] | None = None, **options: Any
) -> list[int]:
    """Their new tokens, without the end; without `ends` those of the folder's own settings."""
    options |= {} if ends is None else {"eos_token_id": ends}
    ids = torch.tensor([encode_prompt(tokenizer, prompt)])
    (row,) = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, pad_token_id=0, **options
    ).tolist()
    found = row[ids.shape[1] :]
    known = theirs.generation_config.eos_token_id if ends is None else ends
    return found[:-1] if found[-1] in known else found


def test_an_import_ends_where_transformers_does(llama: tuple[Path, list[int]], tmp_path: Path) -> None:
    folder, ends = llama
    ours = from_hf(folder, tmp_path / "ours", verify=True)
    tokenizer, model = load_tokenizer(ours), load_model(ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert find_end_ids(ours, tokenizer) == tuple(sorted(ends))
    expected = [tokenizer.decode(_continue(theirs, tokenizer, prompt)) for prompt in PROMPTS]
    options: dict[str, Any] = {"end_ids": find_end_ids(ours, tokenizer)}
    assert continue_texts(model, tokenizer, PROMPTS, NEW, **options) == expected
    assert ["".join(stream_text(model, tokenizer, prompt, NEW, **options)) for prompt in PROMPTS] == expected
    searched = [tokenizer.decode(_continue(theirs, tokenizer, prompt, num_beams=3)) for prompt in PROMPTS]
    assert continue_texts(model, tokenizer, PROMPTS, NEW, num_beams=3, **options) == searched
    for prompt, text in zip(PROMPTS, expected, strict=True):
        arguments = ["generate", str(ours), "--prompt", prompt, "--tokens", str(NEW), "--temperature", "0"]
        assert CliRunner().invoke(app, arguments, catch_exceptions=False).output == f"{prompt}{text}\n"


def test_an_export_names_the_same_ends(llama: tuple[Path, list[int]], tmp_path: Path) -> None:
    """Also as another family, which does not take over the imported config.json."""
    folder, ends = llama
    ours = from_hf(folder, tmp_path / "ours")
    back = to_hf(ours, tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        read = [json.loads((place / name).read_text())["eos_token_id"] for place in (folder, back)]
        assert read[0] == read[1]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back)
    assert theirs.generation_config.eos_token_id == ends
    (ours / ORIGIN).write_text(json.dumps({"model_type": "another"}))
    checksums = json.loads((ours / CHECKSUMS).read_text()) | {ORIGIN: sha256(ours / ORIGIN)}
    (ours / CHECKSUMS).write_text(json.dumps(checksums))
    assert json.loads((to_hf(ours, tmp_path / "other") / "config.json").read_text())["eos_token_id"] == sorted(ends)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"hf_config.json": 9}, [9]),
        ({"hf_config.json": [9, 8]}, [8, 9]),
        ({"generation_config.json": [7, 6], "hf_config.json": 9}, [6, 7]),
        ({"generation_config.json": None, "hf_config.json": [9]}, [9]),
        ({}, []),
    ],
)
def test_the_generation_settings_come_first(
    files: dict[str, Any], expected: list[int], llama: tuple[Path, list[int]], tmp_path: Path
) -> None:
    ours = from_hf(llama[0], tmp_path / "ours")
    for name in ("generation_config.json", "hf_config.json"):
        (ours / name).unlink()
    for name, value in files.items():
        (ours / name).write_text(json.dumps({"eos_token_id": value}))
    tokenizer = load_tokenizer(ours)
    assert find_end_ids(ours, tokenizer) == tuple(sorted({tokenizer.eos_id, *expected}))


@pytest.mark.parametrize("value", ["</s>", [2, "3"], 2.5, True, {"id": 2}])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_ends_that_are_no_ids_are_refused(
    name: str, value: object, llama: tuple[Path, list[int]], tmp_path: Path
) -> None:
    file = llama[0] / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id .* must be a token id, a list of them, or null"):
        from_hf(llama[0], tmp_path / "ours")
