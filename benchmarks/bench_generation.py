"""Generation with a key-value cache: one step compared with the model's forward, and texts with transformers' generate.

Bound by bytes, not by FLOPs: every weight in use is read once per token.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe.config import ModelConfig
from moe.generation import generate
from moe.layers.feed_forward import FeedForward
from moe.layers.transformer_layer import TransformerLayer
from moe.model import Transformer

from . import counts, models
from .contender import Contender, Cost
from .suite import Ratio, Suite


@pytest.mark.parametrize("batch", [1, 16])
def bench_generation_step(batch: int, suite: Suite) -> None:
    small = suite.options.small
    config = models.small_olmoe(small=small)
    context = 32 if small else 256
    model = models.our_model(config, suite.device).eval()
    prompt = torch.randint(config.vocab_size or 0, (batch, context), device=suite.device)
    step, busy = _our_step(model, prompt)
    cost = counts.decode_cost(config, batch, context, num_busy_experts=busy)
    contenders = [Contender("ours", step, cost, outcome=_logits)]
    if importlib.util.find_spec("transformers") is not None:
        for implementation in ("grouped_mm", "eager"):
            theirs = models.transformers_olmoe(model, implementation).eval()
            name = f"transformers {implementation}"
            contenders.append(Contender(name, _their_step(theirs, prompt), cost, outcome=_logits, peer=True))
        contenders[0] = replace(contenders[0], reference=contenders[1])
        contenders[1] = replace(contenders[1], unchecked="the reference")
        contenders[2] = replace(contenders[2], reference=contenders[1])
    suite.run(
        f"generation step, OLMoE in small, {batch} sequences of {context} tokens",
        contenders,
        ratios=[Ratio("ours [fp32]", f"transformers {each} [fp32]") for each in ("grouped_mm", "eager")],
        few=True,
    )


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("kind", ["dense", "MoE"])
def bench_generate(kind: str, batch: int, suite: Suite) -> None:
    """Greedy texts from both libraries' own `generate`, including prompts and token choice; tokens must be equal."""
    if not suite.options.all_rows:
        pytest.skip("with --full: the steps above are what a text is made of")
    pytest.importorskip("transformers", reason="what generation is compared with")
    small = suite.options.small
    config = models.small_olmoe(small=True) if kind == "MoE" else _small_llama()
    sizes = {"num_layers": 1, "vocab_size": 512} if small else {"num_layers": 6, "vocab_size": 4096}
    widths = {"d_model": 64, "d_ff": 32} if small else {"d_model": 256, "d_ff": 512 if kind == "MoE" else 1024}
    config = replace(config, num_heads=8, max_seq_len=512, **sizes, **widths)
    if config.moe is not None:
        config = replace(config, moe=replace(config.moe, num_experts=16, top_k=2))
    model = models.our_model(config, suite.device).eval()
    length, new = 16, 8 if small else 128
    prompt = torch.randint(config.vocab_size or 0, (batch, length), device=suite.device)
    cost = Cost(flops=0.0, bytes=0.0, note=f"{new} tokens")
    contenders = [Contender("ours", lambda: generate(model, prompt.tolist(), new), cost, outcome=_tokens)]
    if kind == "MoE":
        theirs = {each: models.transformers_olmoe(model, each) for each in ("grouped_mm", "eager")}
    else:
        theirs = {"Llama": _transformers_llama(model)}
    for name, each in theirs.items():
        run = _their_generate(each.eval(), prompt, new)
        contenders.append(Contender(f"transformers {name}", run, cost, outcome=_tokens, peer=True))
    reference = contenders[1]
    contenders = [
        replace(each, unchecked="the reference") if each is reference else replace(each, reference=reference)
        for each in contenders
    ]
    suite.run(
        f"generate {new} tokens, small {kind}, {batch} sequences",
        contenders,
        ratios=[Ratio("ours [fp32]", f"{each.name} [fp32]") for each in contenders[1:]],
        few=True,
    )


def _tokens(rows: list[list[int]], _: Any) -> Mapping[str, Tensor]:
    return {"tokens": torch.tensor(rows, dtype=torch.float64)}


def _their_generate(model: nn.Module, prompt: Tensor, new: int) -> Callable[[], list[list[int]]]:
    mask = torch.ones_like(prompt)

    def run() -> list[list[int]]:
        found = model.generate(prompt, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
        return found[:, prompt.shape[1] :].tolist()

    return run


def _small_llama() -> ModelConfig:
    return ModelConfig(
        "llama", 256, 1024, 6, 8, 512, num_kv_heads=4, vocab_size=4096, norm="rmsnorm", position="rope",
        activation="silu", gated=True, bias=False, tie_embeddings=False,
    )  # fmt: skip


def _transformers_llama(model: Transformer) -> nn.Module:
    """LlamaForCausalLM with the weights of `model`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = model.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.kv_heads,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_seq_len,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            attn_implementation="sdpa",
        )
    ).to(model.embedding.weight.device)
    assert model.head is not None and model.final_norm is not None
    named = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, TransformerLayer) and isinstance(layer.feed_forward, FeedForward)
        prefix, attention, network = f"model.layers.{i}", layer.attention, layer.feed_forward
        query, key, value = attention.qkv.weight.split([attention.query_width, attention.kv_width, attention.kv_width])
        assert network.w_gate is not None
        named |= {
            f"{prefix}.self_attn.q_proj.weight": query,
            f"{prefix}.self_attn.k_proj.weight": key,
            f"{prefix}.self_attn.v_proj.weight": value,
            f"{prefix}.self_attn.o_proj.weight": attention.out.weight,
            f"{prefix}.input_layernorm.weight": layer.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": layer.feed_forward_norm.weight,
            f"{prefix}.mlp.gate_proj.weight": network.w_gate,
            f"{prefix}.mlp.up_proj.weight": network.w_in,
            f"{prefix}.mlp.down_proj.weight": network.w_out,
        }
    theirs.load_state_dict({name: tensor.detach() for name, tensor in named.items()})
    return theirs


def _logits(logits: Tensor, _: Any) -> Mapping[str, Tensor]:
    return {"logits": logits}


def _our_step(model: Transformer, prompt: Tensor) -> tuple[Callable[[], Tensor], int]:
    """Repeatedly run the prompt's last token; also return the number of busy experts in the busiest layer."""
    batch, length = prompt.shape
    with torch.inference_mode():
        cache = model.new_cache(batch, length)
        model(prompt[:, :-1], cache=cache)

    def step() -> Tensor:
        with torch.inference_mode():
            cache.length = length - 1
            logits = model(prompt[:, -1:], cache=cache).logits
        assert logits is not None
        return logits[:, -1]

    with torch.inference_mode():
        cache.length = length - 1
        routings = model(prompt[:, -1:], cache=cache).routings
    return step, max(int((routing.tokens_per_expert > 0).sum()) for routing in routings)


def _their_step(model: nn.Module, prompt: Tensor) -> Callable[[], Tensor]:
    renamed = "cache" in inspect.signature(model.forward).parameters  # transformers 5.24; "past_key_values" before
    name = "cache" if renamed else "past_key_values"
    with torch.inference_mode():
        cache = getattr(model(input_ids=prompt[:, :-1], use_cache=True), name)

    def step() -> Tensor:
        with torch.inference_mode():
            output = model(input_ids=prompt[:, -1:], use_cache=True, **{name: cache})
            cache.crop(-1)
        return output.logits[:, -1]

    return step
