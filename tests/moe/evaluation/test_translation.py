"""Translation by demonstration: aligned files, prompts that fit, sacrebleu's own scores."""

from __future__ import annotations

import gzip
import random
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import ModelConfig
from moe.data.tokenizer import Tokenizer, train_tokenizer
from moe.evaluation.parallel_text import ParallelText, load_parallel
from moe.evaluation.translation import Direction, TranslationProtocol, make_prompts, translate
from moe.evaluation.translation_scores import heat_map, record, table, word_splitter
from moe.generation import generate
from moe.model import Transformer
from tests.shared_data import shared_data

DEMOS = {"en": ["a dog", "two cats", "the bird"], "fr": ["un chien", "deux chats", "l'oiseau"]}
TEST = {"en": ["one horse", "a cat and a dog"], "fr": ["un cheval", "un chat et un chien"]}
TEXT = ParallelText(DEMOS, TEST, "files", {})


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([" = ".join(pair) for pair in zip(*DEMOS.values(), strict=True)] * 10, vocab_size=290)


@pytest.fixture
def model(model_config: Callable[..., ModelConfig], tokenizer: Tokenizer) -> Transformer:
    """A model that is as likely to end a line as to say something."""
    config = model_config(vocab_size=tokenizer.vocab_size, max_seq_len=96, tie_embeddings=False)
    model = Transformer(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        model.head.weight[tokenizer.eos_id] = 0.0
    return model.eval()


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    return folder


def test_ntrex_demonstrates_with_whole_documents(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "newstest2019-src.eng.txt": "a\r\nb\r\nc\r\nd\r\n",
            "newstest2019-ref.srp-Latn.txt.gz": "A\u2028A\nB\nC\nD\n",
            "newstest2019-ref-2.spa.txt": "never read\n",
            "DOCUMENT_IDS.tsv": "x\nx\nx\ny\n",
        },
    )
    text = load_parallel(folder, ["eng", "srp-Latn"], demo_lines=2)
    assert text.demos == {"eng": ["a", "b", "c"], "srp-Latn": ["A\u2028A", "B", "C"]}
    assert text.test == {"eng": ["d"], "srp-Latn": ["D"]}
    assert text.layout == "ntrex"
    assert load_parallel(folder, demo_lines=2).test == text.test  # all languages
    with pytest.raises(ValueError, match=r"demo_lines \(4\) leaves none of the 4 lines"):
        load_parallel(folder, demo_lines=4)
    write(tmp_path, {"DOCUMENT_IDS.tsv": "x\n"})
    with pytest.raises(ValueError, match="has 1 ids for 4 lines"):
        load_parallel(folder, demo_lines=2)


def test_flores_demonstrates_with_its_dev_split(tmp_path: Path) -> None:
    files = {f"{split}/{code}.{split}": f"{split} {code}\n" for split in ("dev", "devtest") for code in ("eng", "fra")}
    text = load_parallel(write(tmp_path, files), ["fra", "eng"])
    assert text.layout == "flores"
    assert text.demos == {"fra": ["dev fra"], "eng": ["dev eng"]}
    assert text.test == {"fra": ["devtest fra"], "eng": ["devtest eng"]}


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, {"en.txt": "a\nb\nc\n", "fr.txt": "a\nb\n", "de.txt": "a\n\nc\n", "it.txt": "a\nb\nc\n"})
    with pytest.raises(ValueError, match=r"en.txt has 3 lines and .*fr.txt has 2"):
        load_parallel(folder, ["en", "fr"], demo_lines=1)
    with pytest.raises(ValueError, match=r"de.txt line 2 is empty"):
        load_parallel(folder, ["en", "de"], demo_lines=1)
    with pytest.raises(ValueError, match=r"no language 'eng'; did you mean en"):
        load_parallel(folder, ["eng", "fr"])
    with pytest.raises(ValueError, match=r"no language 'zz'; there are: de, en, fr, it"):
        load_parallel(folder, ["en", "zz"])
    with pytest.raises(ValueError, match="at least two, all different"):
        load_parallel(folder, ["en", "en"])
    (tmp_path / "fr.txt").write_bytes(b"a\nb\n\xe9\n")
    with pytest.raises(ValueError, match=r"fr\.txt is not UTF-8"):
        load_parallel(folder, ["en", "fr"], demo_lines=1)
    (tmp_path / "fr.txt").unlink()
    for damaged in (gzip.compress(b"a\nb\nc\n" * 99)[:-9], b"abc"):
        (tmp_path / "fr.txt.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"fr\.txt\.gz is damaged: .*; replace the file"):
            load_parallel(folder, ["en", "fr"], demo_lines=1)
    with pytest.raises(ValueError, match="is not a folder"):
        load_parallel(tmp_path / "none")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="holds neither"):
        load_parallel(empty)


def test_prompts_are_xglms(tokenizer: Tokenizer) -> None:
    protocol = TranslationProtocol(num_shots=2, max_new_tokens=4)
    prompts = make_prompts(TEXT, "en", "fr", tokenizer, protocol, 999)
    rng, eos = random.Random(0), tokenizer.eos_id
    for prompt, line in zip(prompts, TEST["en"], strict=True):
        expected = [eos]
        for i in rng.sample(range(3), 2):
            expected += [*tokenizer.encode(f"{DEMOS['en'][i]} = {DEMOS['fr'][i]}"), eos]
        assert prompt == ([*expected, *tokenizer.encode(f"{line} =")], 2, False)
    back = make_prompts(TEXT, "fr", "en", tokenizer, protocol, 999)
    assert [tokenizer.decode(prompt.tokens[1:]).count("chien") for prompt in back] == [
        tokenizer.decode(prompt.tokens[1:]).count("dog") for prompt in prompts
    ]  # the same lines demonstrate


def test_other_templates_and_separators(tokenizer: Tokenizer) -> None:
    protocol = TranslationProtocol("{source_language} {source} | {target_language} {target}", 1, "line", 4)
    (prompt, _) = make_prompts(TEXT, "en", "fr", tokenizer, protocol, 999)
    (demo,) = random.Random(0).sample(range(3), 1)
    text = f"en {DEMOS['en'][demo]} | fr {DEMOS['fr'][demo]}\nen one horse | fr"
    assert tokenizer.decode(prompt.tokens[1:]) == text


def test_demonstrations_stop_where_one_does_not_fit(tokenizer: Tokenizer) -> None:
    protocol = TranslationProtocol(num_shots=3, max_new_tokens=5)
    whole = make_prompts(TEXT, "en", "fr", tokenizer, protocol, 999)[0]
    for room in range(len(whole.tokens), 2, -1):
        prompt = make_prompts(TEXT, "en", "fr", tokenizer, protocol, room + 5)[0]
        assert len(prompt.tokens) <= room
        assert prompt.tokens[0] == tokenizer.eos_id
        if prompt.is_cut:
            assert prompt.num_shots == 0 and len(prompt.tokens) == room
            assert prompt.tokens[1:] == whole.tokens[len(whole.tokens) - room + 1 :]
        else:  # what is kept are the first of the same demonstrations
            query = tokenizer.encode("one horse =")
            assert prompt.tokens[: -len(query)] == whole.tokens[: len(prompt.tokens) - len(query)]
            assert prompt.tokens[-len(query) :] == query
    assert prompt.is_cut
    with pytest.raises(ValueError, match=r"limit \(0\) must be at least 1"):
        make_prompts(TEXT, "en", "fr", tokenizer, TranslationProtocol(num_shots=1), 400, limit=0)
    with pytest.raises(ValueError, match=r"max_new_tokens \(5\) leaves no room"):
        make_prompts(TEXT, "en", "fr", tokenizer, protocol, 6)
    with pytest.raises(ValueError, match=r"num_shots \(4\) is more than the 3 lines"):
        make_prompts(TEXT, "en", "fr", tokenizer, TranslationProtocol(num_shots=4), 999)


@pytest.mark.parametrize("num_beams", [1, 2])
def test_lines_do_not_compete_for_experts(
    tight_model: Callable[..., Transformer], tokenizer: Tokenizer, num_beams: int
) -> None:
    """With an evaluation capacity a line would otherwise depend on those translated beside it."""
    tight = tight_model(tokenizer.vocab_size, max_seq_len=96, tie_embeddings=False)
    protocol = TranslationProtocol(num_shots=2, max_new_tokens=6, num_beams=num_beams)
    many = ParallelText(DEMOS, {code: lines * 3 for code, lines in TEST.items()}, "files", {})
    found = translate(tight, tokenizer, many, "en", "fr", protocol)
    assert found == translate(tight, tokenizer, many, "en", "fr", protocol, batch_tokens=1)
    if num_beams == 1:
        prompts = make_prompts(many, "en", "fr", tokenizer, protocol, 96)
        together = generate(tight, [prompt.tokens for prompt in prompts], 6, eos_id=tokenizer.eos_id)
        assert [tokenizer.decode(row).strip() for row in together] != found.hypotheses


@pytest.mark.parametrize("num_beams", [1, 2])
def test_ids_without_a_piece_are_no_text(
    model_config: Callable[..., ModelConfig], tokenizer: Tokenizer, num_beams: int
) -> None:
    """A model whose embedding is wider than the vocabulary, and which writes nothing but the ids beyond it."""
    padded = Transformer(model_config(vocab_size=tokenizer.vocab_size + 8, max_seq_len=96, tie_embeddings=False))
    padded.reset_parameters(seed=0)
    with torch.no_grad():
        padded.head.weight[: tokenizer.vocab_size] = 0.0
        padded.head.weight[tokenizer.vocab_size :] *= 50
    protocol = TranslationProtocol(num_shots=2, max_new_tokens=6, num_beams=num_beams)
    found = translate(padded, tokenizer, TEXT, "en", "fr", protocol)
    assert found.hypotheses == [""] * len(TEST["en"])


@pytest.mark.parametrize("num_beams", [1, 2])
def test_lines_are_what_the_model_writes(model: Transformer, tokenizer: Tokenizer, num_beams: int) -> None:
    many = ParallelText(DEMOS, {code: lines * 6 for code, lines in TEST.items()}, "files", {})
    protocol = TranslationProtocol(num_shots=2, max_new_tokens=6, num_beams=num_beams)
    prompts = make_prompts(many, "en", "fr", tokenizer, protocol, 96)
    assert len({len(prompt.tokens) for prompt in prompts}) > 2  # several lengths, so sorting has something to do
    found = translate(model, tokenizer, many, "en", "fr", protocol, batch_tokens=150)
    assert found.references == TEST["fr"] * 6
    assert len(set(found.hypotheses)) > 3
    if num_beams == 1:
        texts = [
            tokenizer.decode(generate(model, [prompt.tokens], 6, eos_id=tokenizer.eos_id)[0]) for prompt in prompts
        ]
        assert found.hypotheses == [text.split("\n")[0].strip() for text in texts]
    alone = translate(model, tokenizer, many, "en", "fr", protocol, batch_tokens=1)
    assert alone == found
    assert translate(model, tokenizer, many, "en", "fr", protocol, limit=3).hypotheses == found.hypotheses[:3]
    assert (found.num_shots, found.num_fewer, found.num_cut) == (2.0, 0, 0)
    assert found.num_unfinished > 0
    ends = {tokenizer.eos_id, *range(1, 280, 2)}
    ended = translate(model, tokenizer, many, "en", "fr", protocol, end_ids=ends)
    assert ended.num_unfinished < found.num_unfinished
    if num_beams == 1:
        rows = generate(model, [prompt.tokens for prompt in prompts], 6, eos_id=ends)
        assert ended.hypotheses == [tokenizer.decode(row).split("\n")[0].strip() for row in rows]


def test_scores_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="translation is scored by sacrebleu")
    written = ["un cheval court", "un chat et un chien dorment"]
    references = ["un cheval court vite", "un chat et un chien dorment ici"]
    found = record(Direction("en", "fr", written, references, 2.0, 0, 0, 0))
    assert found["bleu"] == sacrebleu.corpus_bleu(written, [references]).score > 0
    assert found["chrf"] == sacrebleu.corpus_chrf(written, [references]).score
    assert "tok:13a" in found["bleu_signature"] and "version:" in found["chrf_signature"]
    assert found["spbleu"] is None and "no FLORES" in found["spbleu_signature"]
    chinese = record(Direction("en", "zho-CN", ["一匹马在跑"], ["一匹马在跑步"], 2.0, 0, 0, 0))
    assert chinese["bleu"] == sacrebleu.corpus_bleu(["一匹马在跑"], [["一匹马在跑步"]], tokenize="zh").score > 0
    assert [word_splitter(code) for code in ("zho_Hans", "eng", "deu")] == ["zh", "13a", "13a"]


def test_spbleu_is_sacrebleus_with_the_same_model(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sacrebleu takes its FLORES model from a folder of its own: there we put ours."""
    pytest.importorskip("sacrebleu", reason="translation is scored by sacrebleu")
    from sacrebleu.metrics import BLEU
    from sacrebleu.tokenizers import tokenizer_spm

    (tmp_path / "models").mkdir()
    tokenizer.save(tmp_path / "models")
    (spm,) = (tmp_path / "models").glob("*.model")
    spm = spm.rename(spm.with_name("sacrebleu_tokenizer_spm.model"))
    monkeypatch.setattr(tokenizer_spm, "SACREBLEU_DIR", str(tmp_path))
    written, references = ["deux chats, un chien", "l'oiseau"], ["deux chats et un chien", "un oiseau"]
    found = record(Direction("en", "fr", written, references, 2.0, 0, 0, 0), spm)
    expected = BLEU(tokenize="flores101").corpus_score(written, [references]).score
    assert found["spbleu"] == pytest.approx(expected, rel=1e-12) and expected > 0
    assert found["spbleu"] != found["bleu"]
    assert "spm:sacrebleu_tokenizer_spm.model:" in found["spbleu_signature"]
    (tmp_path / "no.model").write_text("nothing")
    for name, message in (("no.model", "is not a sentencepiece model"), ("none.model", "does not exist")):
        with pytest.raises(ValueError, match=message):
            record(Direction("en", "fr", written, references, 2.0, 0, 0, 0), tmp_path / name)


def test_the_matrix_holds_every_direction(tmp_path: Path) -> None:
    codes = ["de", "en", "fr"]
    rows = [{"source": s, "target": t, "bleu": 10.0 * i, "spbleu": None, "chrf": 5.0 + i}
            for i, (s, t) in enumerate(permutations(codes, 2))]  # fmt: skip
    text = table(rows, codes)
    assert "| de |  | 0.0 | 10.0 | 5.0 |" in text and "| fr | 40.0 | 50.0 |  | 45.0 |" in text
    assert "| mean | 30.0 | 25.0 | 20.0 | 25.0 |" in text
    assert "### chrf" in text and "spbleu" not in text
    heat_map(tmp_path / "matrix.png", rows, codes)
    assert (tmp_path / "matrix.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{source} ="}, "must hold {source} and {target} once each"),
        ({"template": "{target} = {source}"}, "must end with {target}"),
        ({"template": "{src} {source} = {target}"}, "may hold {source}"),
        ({"separator": "tab"}, r"separator \('tab'\) must be one of"),
        ({"num_shots": -1}, r"num_shots \(-1\) must be at least 0"),
        ({"num_beams": 0}, r"num_beams \(0\) must be at least 1"),
        (
            {"length_penalty": 0.5},
            r"length_penalty \(0\.5\) applies to beam search: set num_beams above 1, or leave it",
        ),
        ({"length_penalty": float("nan")}, r"length_penalty \(nan\) applies to beam search"),
    ],
)
def test_protocols_without_meaning_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TranslationProtocol(**options)


def test_ntrex_itself() -> None:
    """123 documents: no document gives demonstrations and lines to translate."""
    folder = shared_data("ntrex128")
    text = load_parallel(folder, ["eng", "zho-TW", "srp-Latn", "fra"])
    ids = (folder / "DOCUMENT_IDS.tsv").read_text().split()
    count = len(text.demos["eng"])
    assert 100 <= count < 200 and count + len(text.test["eng"]) == 1997
    assert not set(ids[:count]) & set(ids[count:])
    assert not any("\r" in line for lines in text.test.values() for line in lines)
    files = len(list(folder.glob("newstest2019-*.txt.gz")))
    assert len(load_parallel(folder).test) == files - 1  # the second Spanish is left out
