"""A published Llama whose texts begin with <s> and end with </s>, read by transformers and, imported, by us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="the oracle of a published model is transformers")
tokenizers = pytest.importorskip("tokenizers", reason="a tokenizer.json is made with its library")

from moe.checkpoint import load_tokenizer  # noqa: E402 - after the skips, as all below
from moe.data.tokenizer import Tokenizer  # noqa: E402
from moe.evaluation.parallel_text import ParallelText  # noqa: E402
from moe.evaluation.protocols.prompts import build_prompt  # noqa: E402
from moe.evaluation.text_perplexity import PILE, ROLLING, document_tokens, score_domain  # noqa: E402
from moe.evaluation.translation import TranslationProtocol, make_prompts  # noqa: E402
from moe.generation import continue_texts, encode_prompt, stream_text  # noqa: E402
from moe.interop.hf import from_hf  # noqa: E402
from moe.model import Transformer  # noqa: E402
from tests.moe.interop.hf_models import load_ours, load_theirs  # noqa: E402

CLOSE = 1e-9  # relative: float64 on both sides
CLOSE_LOSSES = 1e-5  # the fused losses are float32
BEGIN, END, LENGTH, NEW = 1, 2, 64, 12
SENTENCES = ["the cat sat on the mat because it was warm and soft. ", "a man turned on the tap, so water ran out. "]
PROMPTS = ["the cat sat", "a man turned on the tap, so", ""]


class Published(NamedTuple):
    """One checkpoint on both sides."""

    ours: Transformer
    tokenizer: Tokenizer
    theirs: Any
    their_tokenizer: Any


def write_tokenizer(folder: Path) -> int:
    """Byte-level BPE with Llama's special tokens and post-processor; the size of its vocabulary."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SENTENCES * 4, trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BEGIN)]
    )
    made.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    return int(made.get_vocab_size())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    config = transformers.LlamaConfig(
        vocab_size=write_tokenizer(folder),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=LENGTH,
        initializer_range=0.5,
        bos_token_id=BEGIN,
        eos_token_id=END,
        pad_token_id=END,
    )
    torch.manual_seed(3)
    transformers.LlamaForCausalLM(config).double().save_pretrained(folder)
    imported = from_hf(folder, folder / "imported")
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert their_tokenizer("the").input_ids[0] == BEGIN  # else the oracle is none
    return Published(load_ours(imported), load_tokenizer(imported), load_theirs(folder), their_tokenizer)


def test_generation_is_theirs(published: Published) -> None:
    ours, tokenizer, theirs, their_tokenizer = published
    expected = []
    for prompt in PROMPTS:
        inputs = their_tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        assert encode_prompt(tokenizer, prompt) == inputs.input_ids[0].tolist()
        written = theirs.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0, inputs.input_ids.shape[1] :]
        expected.append(their_tokenizer.decode(written, skip_special_tokens=True))
    assert len(set(expected)) == len(PROMPTS)
    assert continue_texts(ours, tokenizer, PROMPTS, NEW) == expected
    assert ["".join(stream_text(ours, tokenizer, prompt, NEW)) for prompt in PROMPTS] == expected


def test_lm_evals_own_model_gives_the_same(published: Published) -> None:
    pytest.importorskip("lm_eval", reason="its `hf` model is the oracle")
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs it")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from moe.evaluation.lm_eval_adapter import LmEvalModel

    ours, tokenizer, theirs, their_tokenizer = published

    reference = HFLM(pretrained=theirs, tokenizer=their_tokenizer, batch_size=1, max_length=LENGTH)

    def ask(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
        asked = [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]
        return [getattr(model, kind)(asked) for model in (LmEvalModel(ours, tokenizer), reference)]

    pairs = [(SENTENCES[0], "a man"), ("the cat", " sat on the mat"), ("", "the cat")]
    for (found, greedy), (expected, right) in zip(*ask("loglikelihood", pairs), strict=True):
        assert (found, greedy) == (pytest.approx(expected, rel=CLOSE), right)
    texts = [("".join(SENTENCES) * 4,), ("the cat",)]
    assert len(tokenizer.encode(texts[0][0])) > LENGTH
    reference.add_bos_token = False  # else it reads <s><s> and counts the second <s> as a token of the text
    found, expected = ask("loglikelihood_rolling", texts)
    reference.add_bos_token = None
    assert found == pytest.approx(expected, rel=CLOSE_LOSSES)
    score = score_domain(ours, tokenizer, [text for (text,) in texts], ROLLING)
    assert score.nats == pytest.approx(-sum(expected), rel=CLOSE_LOSSES)
    written, right = ask("generate_until", [(prompt, {"until": [], "max_gen_toks": NEW}) for prompt in PROMPTS[:2]])
    assert written == right and all(written)


def test_separators_stay_where_texts_end(published: Published) -> None:
    tokenizer = published.tokenizer
    assert (tokenizer.begin_id, tokenizer.eos_id) == (BEGIN, END)
    demos = {"en": ["a cat"], "fr": ["un chat"]}
    text = ParallelText(demos, {"en": ["the man"], "fr": ["un homme"]}, "files", {})
    for room in (99, 10):  # with a demonstration, and with a query that must be cut
        (prompt,) = make_prompts(text, "en", "fr", tokenizer, TranslationProtocol(num_shots=1, max_new_tokens=4), room)
        assert prompt.tokens[0] == BEGIN and prompt.tokens.count(END) == prompt.num_shots == int(room == 99)
    assert build_prompt(tokenizer, [[7, 8], [7, 9]], [[5]], 20).sequences[0] == [BEGIN, 5, END, 7, 8]
    assert build_prompt(tokenizer, [[7, 8, 9], [7, 9]], [[5]], 4).sequences[0] == [BEGIN, 8, 9]
    assert document_tokens(["a", "b"], tokenizer, PILE)[0].count(BEGIN) == 0
