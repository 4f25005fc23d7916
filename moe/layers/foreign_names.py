"""Other libraries' argument names, and what they are called here: the error that teaches the vocabulary."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable

OURS = {
    "hidden_size": "d_model",
    "hidden_dim": "d_model",
    "dim": "d_model",
    "model_dim": "d_model",
    "embed_dim": "d_model",
    "intermediate_size": "d_ff",
    "moe_intermediate_size": "d_ff",
    "ffn_hidden_size": "d_ff",
    "ffn_dim": "d_ff",
    "d_hidden": "d_ff",
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "moe_num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_top_k": "top_k",
    "moe_router_topk": "top_k",
    "k": "top_k",
    "hidden_act": "activation",
    "activation_fn": "activation",
    "moe_capacity_factor": "capacity_factor",
    "gate": "router",
    "shared_expert_intermediate_size": "shared_d_ff",
}


def refuse_foreign_names(owner: type, given: Iterable[str]) -> None:
    """Raise TypeError naming our argument unless every name in `given` is an argument of `owner`'s constructor."""
    known = list(inspect.signature(owner.__init__).parameters)[1:]  # type: ignore[misc]
    for name in given:
        if name in known:
            continue
        ours = OURS.get(name)
        near = [ours] if ours in known else difflib.get_close_matches(name, known, n=1)
        hint = f"it is called {near[0]} here" if near else f"there are: {', '.join(known)}"
        raise TypeError(f"{owner.__name__} has no argument {name!r}; {hint}")
