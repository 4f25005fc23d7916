"""The same random weights as a model of this project and as one of transformers, with one tokenizer for both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from moe.config import ModelConfig
from moe.data.tokenizer import StreamDecoder
from moe.model import Transformer

EOS = "</s>"
WIDTH, FF_WIDTH, LAYERS, HEADS, LENGTH = 16, 32, 2, 2, 256


class FastTokenizer:
    """A byte-level BPE of the `tokenizers` library with the interface of moe.data.tokenizer."""

    def __init__(self, texts: Iterable[str], vocab_size: int) -> None:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        self.inner = Tokenizer(models.BPE())
        self.inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.inner.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOS],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self.inner.train_from_iterator(texts, trainer)
        self.vocab_size = self.inner.get_vocab_size()
        self.eos_id = self.inner.token_to_id(EOS)
        self.bos_id = None
        self.begin_id = self.eos_id
        self.fallback_ids: frozenset[int] = frozenset()
        self.lossless = True
        self.hash = hashlib.sha256(self.inner.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        return self.inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str], num_threads: int) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: list[int]) -> str:
        return self.inner.decode(tokens, skip_special_tokens=True)

    def stream_decoder(self) -> StreamDecoder:
        return StreamDecoder(self)

    def save(self, folder: Path) -> list[Path]:
        self.inner.save(str(folder / "tokenizer.json"))
        return [folder / "tokenizer.json"]

    def for_transformers(self) -> Any:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast(
            tokenizer_object=self.inner, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
        )


def opt_pair(vocab_size: int, *, seed: int = 0) -> tuple[Transformer, Any]:
    """An OPT of random float64 weights, ours and transformers', whose logits are far from flat."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    config = OPTConfig(
        hidden_size=WIDTH,
        ffn_dim=FF_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        vocab_size=vocab_size,
        word_embed_proj_dim=WIDTH,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        init_std=0.4,
        dropout=0.0,
        attention_dropout=0.0,
    )
    theirs = OPTForCausalLM(config).double().eval()
    ours = _dense("opt", vocab_size, position="learned", activation="relu")
    weights = theirs.state_dict()
    positions = {"position.weight": weights["model.decoder.embed_positions.weight"]}
    ours.load_state_dict(_renamed(weights, "model.decoder", "final_layer_norm") | positions)
    return ours, theirs


def xglm_pair(vocab_size: int, *, seed: int = 0) -> tuple[Transformer, Any]:
    """The same for XGLM: sinusoidal positions, scaled embeddings. In float32: transformers' has no float64."""
    from transformers import XGLMConfig, XGLMForCausalLM

    torch.manual_seed(seed)
    config = XGLMConfig(
        d_model=WIDTH,
        ffn_dim=FF_WIDTH,
        num_layers=LAYERS,
        attention_heads=HEADS,
        max_position_embeddings=LENGTH,
        vocab_size=vocab_size,
        pad_token_id=0,
        eos_token_id=0,
        bos_token_id=0,
        init_std=0.4,
        dropout=0.0,
        attention_dropout=0.0,
        activation_dropout=0.0,
        layerdrop=0.0,
    )
    theirs = XGLMForCausalLM(config).eval()
    ours = _dense("xglm", vocab_size, position="sinusoidal", activation="gelu", scale_embeddings=True).float()
    ours.load_state_dict(_renamed(theirs.state_dict(), "model", "layer_norm"))
    return ours, theirs


def gpt2_pair(vocab_size: int, *, seed: int = 0) -> tuple[Transformer, Any]:
    """The same for GPT-2: no offset of its positions, the approximate GELU, weights the other way round."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_embd=WIDTH,
        n_inner=FF_WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=LENGTH,
        vocab_size=vocab_size,
        eos_token_id=0,
        bos_token_id=0,
        initializer_range=0.4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    theirs = GPT2LMHeadModel(config).double().eval()
    ours = _dense("gpt2", vocab_size, position="learned", activation="gelu_tanh", position_offset=0)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    renamed = {"embedding.weight": weights["wte.weight"], "position.weight": weights["wpe.weight"]}
    for kind in ("weight", "bias"):
        renamed[f"final_norm.{kind}"] = weights[f"ln_f.{kind}"]
        for i in range(LAYERS):
            for name, other in (("attention.qkv", "attn.c_attn"), ("attention.out", "attn.c_proj")):
                renamed[f"layers.{i}.{name}.{kind}"] = _turned(weights[f"h.{i}.{other}.{kind}"])
            for name, other in (("attention_norm", "ln_1"), ("feed_forward_norm", "ln_2")):
                renamed[f"layers.{i}.{name}.{kind}"] = weights[f"h.{i}.{other}.{kind}"]
            for name, other in (("in", "c_fc"), ("out", "c_proj")):
                renamed[f"layers.{i}.feed_forward.{kind[0]}_{name}"] = _turned(weights[f"h.{i}.mlp.{other}.{kind}"])
    ours.load_state_dict(renamed)
    return ours, theirs


def _turned(tensor: torch.Tensor) -> torch.Tensor:
    """A matrix (in, out) as (out, in); a bias as it is."""
    return tensor.T if tensor.dim() == 2 else tensor


def _dense(name: str, vocab_size: int, **options: Any) -> Transformer:
    config = ModelConfig(
        name=name,
        d_model=WIDTH,
        d_ff=FF_WIDTH,
        num_layers=LAYERS,
        num_heads=HEADS,
        max_seq_len=LENGTH,
        vocab_size=vocab_size,
        norm="layernorm",
        bias=True,
        **{"position_offset": 2, **options},
    )
    return Transformer(config, dtype=torch.float64).eval()


def _renamed(weights: dict[str, torch.Tensor], root: str, final_norm: str) -> dict[str, torch.Tensor]:
    """transformers' names of OPT and XGLM to ours."""
    renamed = {
        "embedding.weight": weights[f"{root}.embed_tokens.weight"],
        "final_norm.weight": weights[f"{root}.{final_norm}.weight"],
        "final_norm.bias": weights[f"{root}.{final_norm}.bias"],
    }
    for i in range(LAYERS):
        theirs, ours = f"{root}.layers.{i}", f"layers.{i}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{theirs}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            renamed[f"{ours}.attention.qkv.{kind}"] = torch.cat(parts)
            renamed[f"{ours}.attention.out.{kind}"] = weights[f"{theirs}.self_attn.out_proj.{kind}"]
            renamed[f"{ours}.attention_norm.{kind}"] = weights[f"{theirs}.self_attn_layer_norm.{kind}"]
            renamed[f"{ours}.feed_forward_norm.{kind}"] = weights[f"{theirs}.final_layer_norm.{kind}"]
        for theirs_name, name in (("fc1", "in"), ("fc2", "out")):
            renamed[f"{ours}.feed_forward.w_{name}"] = weights[f"{theirs}.{theirs_name}.weight"]
            renamed[f"{ours}.feed_forward.b_{name}"] = weights[f"{theirs}.{theirs_name}.bias"]
    return renamed
