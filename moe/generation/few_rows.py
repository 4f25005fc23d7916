"""A MoE layer for the few tokens of one generation step: each chosen expert multiplies its own rows, without padding.

There are few enough rows to order them in Python, and each operation saved is a microsecond of a step that has a few
hundred. With more than `MOST_ROWS` rows, or a router other than plain top-k, the layer's own forward is called.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from moe.generation.products import StackedMatrices
from moe.layers.dispatch import LocalDispatcher
from moe.layers.experts import Experts
from moe.layers.feed_forward import ACTIVATIONS
from moe.layers.moe import MoE
from moe.layers.router import TopKRouter

MOST_ROWS = 128  # T·K


class FewRows:
    """`layer` without its Routing output. (T, D) -> (T, D)"""

    def __init__(self, layer: MoE, copied: bool) -> None:
        self.layer = layer
        router, experts = layer.router, layer.experts
        self.direct = (
            type(router) is TopKRouter
            and type(experts) is Experts
            and type(layer.dispatcher) is LocalDispatcher
            and router.expert_bias is None
            and router.num_groups is None
            and router.eval_capacity_factor is None
            and experts.backend in ("auto", "torch")
            and not any(m._forward_hooks or m._forward_pre_hooks for m in (router, experts, layer.dispatcher))
        )
        dtype = torch.promote_types(router.weight.dtype, torch.float32)
        self.router_dtype = dtype if router.router_dtype is None else router.router_dtype
        self.router_weight = router.weight.to(self.router_dtype)
        self.w_in = StackedMatrices(experts.w_in, copied)
        self.w_gate = None if experts.w_gate is None else StackedMatrices(experts.w_gate, copied)
        self.w_out = StackedMatrices(experts.w_out, copied)
        self.act = ACTIVATIONS[experts.activation]

    def __call__(self, x: Tensor) -> Tensor:
        """Same as the layer's forward in evaluation mode, NonFiniteScoresError included."""
        num_rows = x.shape[0] * self.layer.router.top_k
        if not self.direct or num_rows > MOST_ROWS:
            return self.layer(x)[0]
        weights, indices = self._route(x)  # (T, K)
        slots = [expert for row in indices.tolist() for expert in row]
        y = self._experts(x, slots)  # (R, D), slot by slot
        if x.shape[0] == 1:
            y = torch.mm(weights, y)
        else:
            y = torch.bmm(weights[:, None], y.view(x.shape[0], -1, x.shape[1]))[:, 0]
        return y if self.layer.shared is None else y + self.layer._shared(x, None)

    def _route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Expert weights, in the dtype of x, and indices, best first. (T, K) each"""
        router = self.layer.router
        assert isinstance(router, TopKRouter)
        logits = F.linear(x.to(self.router_dtype), self.router_weight)  # (T, E)
        # on equal scores take the lower index, which torch.topk does not guarantee
        indices = logits.sort(dim=1, descending=True, stable=True).indices[:, : router.top_k]
        weights = router.weights(router.probabilities(logits), indices, torch.ones_like(indices, dtype=torch.bool))
        if not bool(weights.isfinite().all()):
            router(x)  # raises, saying what is wrong with the scores
        return weights.to(x.dtype), indices

    def _experts(self, x: Tensor, slots: list[int]) -> Tensor:
        """Output of expert `slots[r]` for token r // K. (T, D) -> (R, D)"""
        experts = self.layer.experts
        top_k = len(slots) // x.shape[0]
        if x.shape[0] == 1:
            order = None
            spans = [(expert, 1) for expert in slots]
            rows = (x,) * top_k
        else:
            order = sorted(range(len(slots)), key=slots.__getitem__)
            spans = [(expert, len(list(group))) for expert, group in groupby(order, key=slots.__getitem__)]
            rows = x.index_select(0, torch.tensor([slot // top_k for slot in order])).split([n for _, n in spans])
        hidden = torch.cat([torch.mm(row, self.w_in[e]) for row, (e, _) in zip(rows, spans, strict=True)])  # (R, F)
        of_row = None
        if experts.b_in is not None:
            of_row = torch.tensor(slots if order is None else [slots[slot] for slot in order])
            hidden += experts.b_in.index_select(0, of_row)
        if self.w_gate is None:
            hidden = self.act(hidden)
        else:
            gate = torch.cat([torch.mm(row, self.w_gate[e]) for row, (e, _) in zip(rows, spans, strict=True)])
            hidden = self.act(gate).mul_(hidden)
        parts = hidden.split([n for _, n in spans])
        y = torch.cat([torch.mm(part, self.w_out[e]) for part, (e, _) in zip(parts, spans, strict=True)])  # (R, D)
        if experts.b_out is not None and of_row is not None:
            y += experts.b_out.index_select(0, of_row)
        if order is None:
            return y
        back = torch.empty(len(order), dtype=torch.int64)
        back[torch.tensor(order)] = torch.arange(len(order))
        return y.index_select(0, back)
