"""The families of published checkpoints, and which of them can express a given model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from moe.config import ModelConfig
from moe.interop.hf import dense_families as dense
from moe.interop.hf import moe_families as sparse
from moe.interop.hf import names
from moe.interop.hf.keys import Keys
from moe.interop.hf.slots import Slot, make_slots


class Family(NamedTuple):
    """One architecture: its tensor names, and its configuration in both directions."""

    model_type: str  # as in config.json
    architecture: str  # the class used by AutoModelForCausalLM
    table: names.Table
    read: Callable[[Keys], dict[str, Any]]  # fields of ModelConfig
    lacks: Callable[[ModelConfig], list[str]]  # why a model of ours cannot be expressed
    write: Callable[[ModelConfig], dict[str, Any]]
    prefix: str = "model."  # of all names but the head's; files of the bare model omit it
    buffers: str = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"  # in old files; computed here
    fused: names.Table | None = None  # an alternative layout that can be read
    text_format: str = "plain"  # data.text_format of the corpus it was trained on

    def slots(self, model: ModelConfig) -> list[list[Slot]]:
        """Every tensor of a model with its location, in the family's layout and, if there is one, the fused layout."""
        return make_slots(model, self.table, *([] if self.fused is None else [self.fused]))


_ALL = (
    Family(
        "opt", "OPTForCausalLM", names.OPT, dense.read_opt, dense.opt_lacks, dense.write_opt,
        buffers=r"model\.decoder\.version",
    ),
    Family(
        "xglm", "XGLMForCausalLM", names.XGLM, dense.read_xglm, dense.xglm_lacks, dense.write_xglm,
        buffers=r"model\.embed_positions\.weights", text_format="fairseq",
    ),
    Family(
        "gpt2", "GPT2LMHeadModel", names.GPT2, dense.read_gpt2, dense.gpt2_lacks, dense.write_gpt2,
        prefix="transformer.", buffers=r"transformer\.h\.\d+\.attn\.(masked_)?bias",
    ),
    Family("llama", "LlamaForCausalLM", names.LLAMA, dense.read_llama, dense.llama_lacks, dense.write_llama),
    Family(
        "mixtral", "MixtralForCausalLM", names.MIXTRAL, sparse.read_mixtral, sparse.mixtral_lacks, sparse.write_mixtral,
        fused=names.FUSED,
    ),
    Family(
        "olmoe", "OlmoeForCausalLM", names.OLMOE, sparse.read_olmoe, sparse.olmoe_lacks, sparse.write_olmoe,
        fused=names.FUSED,
    ),
    Family(
        "qwen3_moe", "Qwen3MoeForCausalLM", names.QWEN3_MOE, sparse.read_qwen3_moe, sparse.qwen3_moe_lacks,
        sparse.write_qwen3_moe, fused=names.FUSED,
    ),
    Family(
        "dots1", "Dots1ForCausalLM", names.DOTS1, sparse.read_dots1, sparse.dots1_lacks, sparse.write_dots1,
        fused=names.FUSED,
    ),
)  # fmt: skip
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

# known architectures that cannot be expressed, with the reason
_REFUSED = {
    "deepseek_v2": "its multi-head latent attention (kv_lora_rank) has no layer here",
    "deepseek_v3": "its multi-head latent attention (kv_lora_rank) has no layer here; dots1 has the same experts "
    "over ordinary attention",
    "nllb-moe": "it has an encoder",
    "switch_transformers": "it has an encoder",
}


def read_config(folder: Path) -> tuple[Family, ModelConfig]:
    """The family and model shape described by a folder's config.json.

    Raises ValueError for another family, and for keys and values that cannot be expressed.
    """
    keys = Keys.open(folder)
    name = keys.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        reason = f"; {_REFUSED[name]}" if isinstance(name, str) and name in _REFUSED else ""
        raise ValueError(
            f"{keys.origin}: model_type ({name!r}) is not supported; supported are: {', '.join(FAMILIES)}{reason}"
        )
    family = FAMILIES[name]
    fields = family.read(keys)
    keys.finish()
    return family, ModelConfig(name=folder.resolve().name, **fields)


def choose_family(model: ModelConfig, wanted: str | None, carried: str | None) -> Family:
    """The family to export as: the wanted one, else the one it was imported from, else the first that fits.

    Raises ValueError with the reasons if none fits, or the wanted one does not.
    """
    if wanted is not None and wanted not in FAMILIES:
        raise ValueError(f"--family ({wanted!r}) must be one of: {', '.join(FAMILIES)}")
    candidates = [FAMILIES[wanted]] if wanted is not None else sorted(_ALL, key=lambda f: f.model_type != carried)
    reasons = {family.model_type: family.lacks(model) for family in candidates}
    for family in candidates:
        if not reasons[family.model_type]:
            return family
    nearest = sorted(reasons, key=lambda name: len(reasons[name]))[:3]
    told = "\n".join(f"  {name}: {'; '.join(reasons[name])}" for name in nearest)
    raise ValueError(
        f"model {model.name} fits no family of transformers, so it cannot be exported. What the nearest would need:\n"
        f"{told}"
    )
