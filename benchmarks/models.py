"""Whole models: the presets as the trainer steps them, and a small OLMoE, ours and transformers' with equal weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from moe.compose import compose
from moe.config import ModelConfig, OptimConfig
from moe.layers.experts import Experts
from moe.layers.moe import MoE
from moe.layers.transformer_layer import TransformerLayer
from moe.model import Transformer
from moe.training.loss import LossOutput, compute_loss
from moe.training.optimizer import clip_gradients, gradient_norm, make_optimizer

CLIP = 1.0

_Output = TypeVar("_Output")
Step = tuple[Callable[[], _Output], Callable[[_Output], None]]  # forward, and everything after it


def small_olmoe(*, small: bool) -> ModelConfig:
    """OLMoE 1B-7B with every width divided by 4 and the depth by 8: 64 experts, 8 of them active."""
    config = compose(["model=olmoe_1b_7b"]).model
    layers, vocab = (1, 1024) if small else (2, 12576)
    width, d_ff, heads = (64, 32, 4) if small else (512, 256, 4)
    return replace(config, d_model=width, d_ff=d_ff, num_heads=heads, num_layers=layers, vocab_size=vocab)


def our_model(config: ModelConfig, device: torch.device, *, backend: str = "auto") -> Transformer:
    """A model drawn from seed 0, set up as by the trainer."""
    model = Transformer(config, backend=backend, device=device)
    model.reset_parameters(0)
    for module in model.modules():
        if isinstance(module, Experts):
            module.persistent_grad()
    return model


def our_step(model: Transformer, optim: OptimConfig, tokens: Tensor, targets: Tensor) -> Step[LossOutput]:
    """Forward with losses; then backward, clipping, fused AdamW and freeing the gradients."""
    optimizer = make_optimizer(model, optim)

    def forward() -> LossOutput:
        return compute_loss(model(tokens, targets), None, model.config.moe)

    def backward(output: LossOutput) -> None:
        output.loss.backward()
        clip_gradients(model.parameters(), gradient_norm(model.parameters()), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return forward, backward


def transformers_olmoe(model: Transformer, implementation: str) -> nn.Module:
    """OlmoeForCausalLM with the weights of `model`, which has OLMoE's shape. It has no z-loss."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = model.config
    assert config.moe is not None
    theirs = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.d_ff,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_experts=config.moe.num_experts,
            num_experts_per_tok=config.moe.top_k,
            norm_topk_prob=config.moe.normalize_weights,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            max_position_embeddings=config.max_seq_len,
            router_aux_loss_coef=config.moe.load_balance_weight / config.moe.top_k,  # theirs is K at balance, ours 1
            tie_word_embeddings=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="sdpa",
            experts_implementation=implementation,
        )
    ).to(model.embedding.weight.device)
    theirs.load_state_dict(_as_olmoe(model))
    return theirs


def _as_olmoe(model: Transformer) -> dict[str, Tensor]:
    assert model.head is not None and model.final_norm is not None
    named = {
        "model.embed_tokens.weight": model.embedding.weight,
        "model.norm.weight": model.final_norm.weight,
        "lm_head.weight": model.head.weight,
    }
    for i, layer in enumerate(model.layers):
        assert isinstance(layer, TransformerLayer) and isinstance(layer.feed_forward, MoE)
        prefix, attention, sparse = f"model.layers.{i}", layer.attention, layer.feed_forward
        query, key, value = attention.qkv.weight.split([attention.query_width, attention.kv_width, attention.kv_width])
        assert sparse.experts.w_gate is not None
        named |= {
            f"{prefix}.self_attn.q_proj.weight": query,
            f"{prefix}.self_attn.k_proj.weight": key,
            f"{prefix}.self_attn.v_proj.weight": value,
            f"{prefix}.self_attn.o_proj.weight": attention.out.weight,
            f"{prefix}.self_attn.q_norm.weight": attention.q_norm.weight,
            f"{prefix}.self_attn.k_norm.weight": attention.k_norm.weight,
            f"{prefix}.input_layernorm.weight": layer.attention_norm.weight,
            f"{prefix}.post_attention_layernorm.weight": layer.feed_forward_norm.weight,
            f"{prefix}.mlp.gate.weight": sparse.router.weight,
            f"{prefix}.mlp.experts.gate_up_proj": torch.cat([sparse.experts.w_gate, sparse.experts.w_in], dim=1),
            f"{prefix}.mlp.experts.down_proj": sparse.experts.w_out,
        }
    return {name: tensor.detach() for name, tensor in named.items()}


def transformers_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, targets: Tensor) -> Step[Any]:
    """Their forward with cross-entropy and load-balance loss; backward, clipping, AdamW and freeing the gradients."""

    def forward() -> Any:
        # shift_labels are already shifted targets, as ours are
        return model(input_ids=tokens, labels=targets, shift_labels=targets, output_router_logits=True)

    def backward(output: Any) -> None:
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return forward, backward


def mixed(step: Step[_Output], dtype: torch.dtype, device: torch.device) -> Step[_Output]:
    """The same step with matrix products in `dtype`; weights, and everything after the forward, stay in float32."""
    forward, backward = step
    if dtype == torch.float32:
        return step

    def under_autocast() -> _Output:
        with torch.autocast(device.type, dtype):
            return forward()

    return under_autocast, backward


def our_cross_entropy(output: LossOutput, _: Any) -> Mapping[str, Tensor]:
    """The part of a step that is compared."""
    return {"cross-entropy": output.cross_entropy}


def their_cross_entropy(model: Any) -> Callable[[Any, Any], Mapping[str, Tensor]]:
    """The same for theirs: without the load-balance loss, which averages over all layers' tokens together."""
    return lambda output, _: {"cross-entropy": output.loss - model.config.router_aux_loss_coef * output.aux_loss}


def adamw(parameters: Any, **options: Any) -> torch.optim.AdamW:
    """AdamW with the trainer's default settings, and a learning rate that leaves the weights unchanged.

    Its moments are already allocated and written, so that the first step costs the same as the others.
    """
    optimizer = torch.optim.AdamW(parameters, lr=STILL, betas=(0.9, 0.98), weight_decay=0.0, **options)
    for group in optimizer.param_groups:
        for leaf in group["params"]:
            moments = {name: torch.empty_like(leaf).zero_() for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[leaf] = {
                "step": torch.zeros((), device=leaf.device if options.get("fused") else None)
            } | moments
    return optimizer


STILL = 1e-12  # the update is computed and written, yet the next call sees the same model


def optim_config() -> OptimConfig:
    """The trainer's, with that learning rate."""
    return OptimConfig(lr=STILL, weight_decay=0.0)
