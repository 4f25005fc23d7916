"""Whether the same weights compute the same function: the configuration that no tensor's shape shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from moe.config import ModelConfig
from moe.config.fields import as_override

_IN_TRAINING_ALONE = {
    *("name", "dropout", "attention_dropout", "init", "init_std"),
    *("moe.name", "moe.second_policy", "moe.jitter", "moe.bias_balance_rate", "moe.capacity_factor"),
    *("moe.load_balance_weight", "moe.load_balance_choices", "moe.load_balance_scope", "moe.load_balance_reduction"),
    "moe.router_z_loss_weight",
}
# None there defers to another field or the tokenizer; another context length changes no token's figures
_IN_SHAPES = {"vocab_size", "expert_d_ff", "embedding_dim", "max_seq_len"}
_OF_ROPE = {"rope_theta", "rope_scaling"}


def function_changes(stored: ModelConfig, given: ModelConfig) -> dict[str, tuple[str, str]]:
    """Fields that make the weights of a `stored` model compute something else in a `given` one that they fit.

    Such as {"model.rope_theta": ("500000.0", "10000.0")}: both values in override syntax, the stored one first.
    Dropout, losses and other settings that matter only in training are not compared.
    """
    a, b = _function(stored), _function(given)
    return {
        f"model.{name}": (as_override(a.get(name)), as_override(b.get(name)))
        for name in sorted(a.keys() | b.keys())
        if a.get(name) != b.get(name)
    }


def _function(model: ModelConfig) -> dict[str, Any]:
    """The fields that determine what is computed, flat, each with its effective value."""
    flat = asdict(model) | {"num_kv_heads": model.kv_heads, "head_dim": model.head_width}
    flat |= {f"moe.{name}": value for name, value in (flat.pop("moe") or {}).items()}
    unread = _IN_TRAINING_ALONE | _IN_SHAPES | (set() if model.position == "rope" else _OF_ROPE)
    return {name: value for name, value in flat.items() if name not in unread}
