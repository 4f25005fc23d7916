"""The families' tensor names: one table each, from our names to theirs.

    "name"                 the same tensor
    "a{e}b"                one tensor per expert, stacked in ours
    ("q", "k", "v")        tensors whose rows are concatenated in ours
    Transposed("name")     theirs has (in, out) where ours has (out, in): GPT-2's Conv1D

{i} is the layer. Names are those of published files, which transformers 5 also writes, although it holds experts fused
in memory.
"""

from __future__ import annotations

from typing import NamedTuple


class Transposed(NamedTuple):
    """A transposed matrix."""

    name: str


class Half(NamedTuple):
    """The first or second half of a stack (E, 2F, D) that concatenates two matrices per expert."""

    name: str
    which: int


Theirs = str | tuple[str, ...] | Transposed | Half
Table = dict[str, Theirs]

_OURS, _ATTENTION = "layers.{i}", "layers.{i}.attention"


def _fairseq(root: str, final_norm: str) -> Table:
    """OPT and XGLM, which use the names of fairseq's decoder."""
    layer = f"{root}layers.{{i}}"
    table: Table = {
        "embedding.weight": f"{root}embed_tokens.weight",
        "position.weight": f"{root}embed_positions.weight",
        "project_in.weight": f"{root}project_in.weight",
        "project_out.weight": f"{root}project_out.weight",
        "head.weight": "lm_head.weight",
    }
    for kind in ("weight", "bias"):
        table |= {
            f"final_norm.{kind}": f"{root}{final_norm}.{kind}",
            f"{_OURS}.attention_norm.{kind}": f"{layer}.self_attn_layer_norm.{kind}",
            f"{_OURS}.feed_forward_norm.{kind}": f"{layer}.final_layer_norm.{kind}",
            f"{_ATTENTION}.qkv.{kind}": tuple(f"{layer}.self_attn.{each}_proj.{kind}" for each in "qkv"),
            f"{_ATTENTION}.out.{kind}": f"{layer}.self_attn.out_proj.{kind}",
            f"{_OURS}.feed_forward.{'w' if kind == 'weight' else 'b'}_in": f"{layer}.fc1.{kind}",
            f"{_OURS}.feed_forward.{'w' if kind == 'weight' else 'b'}_out": f"{layer}.fc2.{kind}",
        }
    return table


def _gpt2() -> Table:
    layer = "transformer.h.{i}"
    table: Table = {
        "embedding.weight": "transformer.wte.weight",
        "position.weight": "transformer.wpe.weight",
        "head.weight": "lm_head.weight",
        f"{_ATTENTION}.qkv.weight": Transposed(f"{layer}.attn.c_attn.weight"),
        f"{_ATTENTION}.qkv.bias": f"{layer}.attn.c_attn.bias",
        f"{_ATTENTION}.out.weight": Transposed(f"{layer}.attn.c_proj.weight"),
        f"{_ATTENTION}.out.bias": f"{layer}.attn.c_proj.bias",
        f"{_OURS}.feed_forward.w_in": Transposed(f"{layer}.mlp.c_fc.weight"),
        f"{_OURS}.feed_forward.b_in": f"{layer}.mlp.c_fc.bias",
        f"{_OURS}.feed_forward.w_out": Transposed(f"{layer}.mlp.c_proj.weight"),
        f"{_OURS}.feed_forward.b_out": f"{layer}.mlp.c_proj.bias",
    }
    for kind in ("weight", "bias"):
        table |= {
            f"final_norm.{kind}": f"transformer.ln_f.{kind}",
            f"{_OURS}.attention_norm.{kind}": f"{layer}.ln_1.{kind}",
            f"{_OURS}.feed_forward_norm.{kind}": f"{layer}.ln_2.{kind}",
        }
    return table


def _gated(ours: str, theirs: str) -> Table:
    """A gated network, named alike by Llama and its descendants, whether dense, shared, or one of many."""
    return {
        f"{ours}.w_gate": f"{theirs}.gate_proj.weight",
        f"{ours}.w_in": f"{theirs}.up_proj.weight",
        f"{ours}.w_out": f"{theirs}.down_proj.weight",
    }


_LAYER = "model.layers.{i}"
_LLAMA_ATTENTION: Table = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
    f"{_OURS}.attention_norm.weight": f"{_LAYER}.input_layernorm.weight",
    f"{_OURS}.feed_forward_norm.weight": f"{_LAYER}.post_attention_layernorm.weight",
    f"{_ATTENTION}.qkv.weight": tuple(f"{_LAYER}.self_attn.{each}_proj.weight" for each in "qkv"),
    f"{_ATTENTION}.out.weight": f"{_LAYER}.self_attn.o_proj.weight",
}
_QK_NORM: Table = {f"{_ATTENTION}.{each}_norm.weight": f"{_LAYER}.self_attn.{each}_norm.weight" for each in "qk"}
_EXPERTS: Table = {
    f"{_OURS}.feed_forward.router.weight": f"{_LAYER}.mlp.gate.weight",
    **_gated(f"{_OURS}.feed_forward.experts", f"{_LAYER}.mlp.experts.{{e}}"),
}

OPT = _fairseq("model.decoder.", "final_layer_norm")
XGLM = _fairseq("model.", "layer_norm")
GPT2 = _gpt2()
LLAMA = _LLAMA_ATTENTION | _gated(f"{_OURS}.feed_forward", f"{_LAYER}.mlp")
MIXTRAL: Table = _LLAMA_ATTENTION | {
    f"{_OURS}.feed_forward.router.weight": f"{_LAYER}.block_sparse_moe.gate.weight",
    f"{_OURS}.feed_forward.experts.w_gate": f"{_LAYER}.block_sparse_moe.experts.{{e}}.w1.weight",
    f"{_OURS}.feed_forward.experts.w_out": f"{_LAYER}.block_sparse_moe.experts.{{e}}.w2.weight",
    f"{_OURS}.feed_forward.experts.w_in": f"{_LAYER}.block_sparse_moe.experts.{{e}}.w3.weight",
}
OLMOE = _LLAMA_ATTENTION | _QK_NORM | _EXPERTS
QWEN3_MOE = LLAMA | _QK_NORM | _EXPERTS
DOTS1 = (
    QWEN3_MOE
    | _gated(f"{_OURS}.feed_forward.shared", f"{_LAYER}.mlp.shared_experts")
    | {f"{_OURS}.feed_forward.router.expert_bias": f"{_LAYER}.mlp.gate.e_score_correction_bias"}
)

# the layout of transformers 5 in memory, also written when told to keep its own names; read, never written
FUSED: Table = {
    f"{_OURS}.feed_forward.router.weight": f"{_LAYER}.mlp.gate.weight",
    f"{_OURS}.feed_forward.experts.w_gate": Half(f"{_LAYER}.mlp.experts.gate_up_proj", 0),
    f"{_OURS}.feed_forward.experts.w_in": Half(f"{_LAYER}.mlp.experts.gate_up_proj", 1),
    f"{_OURS}.feed_forward.experts.w_out": f"{_LAYER}.mlp.experts.down_proj",
}
