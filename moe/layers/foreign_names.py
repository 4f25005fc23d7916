"""Other libraries' argument names and ours, for an error that teaches the vocabulary."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import ParamSpec

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


P = ParamSpec("P")


def refuses_foreign_names(init: Callable[P, None]) -> Callable[P, None]:
    """The same constructor, which names our argument for a foreign one before Python reports one missing.

    It keeps the signature of `init`. If a subclass has its own constructor, the arguments it passes on are checked.
    """

    @functools.wraps(init)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        refuse_foreign_names(init, kwargs)
        init(*args, **kwargs)

    return checked


def refuse_foreign_names(init: Callable[..., None], given: Iterable[str]) -> None:
    """Raise TypeError naming our argument unless every name in `given` is an argument of the constructor `init`."""
    known = list(inspect.signature(init).parameters)[1:]
    for name in given:
        if name in known:
            continue
        ours = OURS.get(name)
        near = [ours] if ours in known else difflib.get_close_matches(name, known, n=1)
        hint = f"it is called {near[0]} here" if near else f"there are: {', '.join(known)}"
        raise TypeError(f"{init.__qualname__.split('.')[0]} has no argument {name!r}; {hint}")
