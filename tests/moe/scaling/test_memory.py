"""What a rank holds, in closed form. tests/moe/test_dry_run.py compares with what simulated ranks hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from moe.compose import compose
from moe.config import ParallelConfig, RunConfig
from moe.layers.position import rotary_rotation
from moe.model import Transformer
from moe.scaling.activations import row_bytes
from moe.scaling.memory import layer_bytes_alone, memory_bound, plan_memory, rank_share
from moe.scaling.params import count_params
from moe.scaling.routing_load import RoutingLoad
from moe.scaling.sharding import ParameterGroup, parameter_groups
from tests.moe.scaling.filling_load import Filling

PRESETS = ["tiny", "opt_350m", "125m", "llama_1b", "mixtral_8x7b", "olmoe_1b_7b"]


def configured(*overrides: str) -> RunConfig:
    return compose(["model.vocab_size=5001", "train.batch_tokens=65536", *overrides])


@pytest.mark.parametrize("moe", [[], ["+moe=8e"], ["+moe=deepseek_64e"]], ids=["dense", "8e", "deepseek_64e"])
@pytest.mark.parametrize("preset", PRESETS)
def test_groups_hold_every_parameter_once(preset: str, moe: list[str]) -> None:
    model = configured(f"model={preset}", *moe).model
    groups = parameter_groups(model, ParallelConfig(), 1)
    assert sum(group.numel for group in groups) == count_params(model).total
    experts = sum(group.numel for group in groups if group.kind == "experts")
    assert experts == count_params(model).expert


def test_experts_are_divided_by_ep_and_dp_shard_and_all_else_by_both() -> None:
    model = configured("+moe=16e").model
    whole = {group.kind: group for group in parameter_groups(model, ParallelConfig(), 1) if group.layer in (None, 0)}
    parts = parameter_groups(model, ParallelConfig(ep_size=4, dp_replicate=2), 16)
    for group in parts:
        if group.layer not in (None, 0):
            continue
        shards = {"experts": (2, whole["experts"].numel // 4)}.get(group.kind, (8, whole[group.kind].numel))
        assert (group.num_shards, group.numel, group.num_copies) == (*shards, 2)


def test_a_shard_is_padded_to_that_of_the_fullest_rank() -> None:
    group = ParameterGroup("layer", 0, ((5001, 8), (3,), (16,)), num_shards=8, num_copies=1, shard_dim=0)
    assert group.padded_shard == 626 * 8 + 1 + 2
    assert group.numel == 5001 * 8 + 3 + 16


def test_ranks_that_the_axes_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"2 \* 4\) must divide the number of ranks \(12\)"):
        parameter_groups(configured("+moe=16e").model, ParallelConfig(ep_size=4, dp_replicate=2), 12)


def test_recompute_keeps_less_and_a_longer_batch_more() -> None:
    config = configured("+moe=16e", "parallel.ep_size=4")
    load = RoutingLoad("uniform", 16, 4, 2)
    plans = [
        plan_memory(each, 8, load, sequences=sequences, micro_batches=1)
        for each, sequences in (
            (replace(config, train=replace(config.train, recompute=True)), 32),
            (config, 32),
            (config, 64),
        )
    ]
    activations = [plan.activation_bytes for plan in plans]
    assert activations[0] < 0.6 * activations[1] < activations[1] < 0.6 * activations[2]
    assert len({plan.param_bytes for plan in plans}) == 1


def test_the_bound_is_all_tokens_of_all_ranks_on_one() -> None:
    config = configured("+moe=16e", "parallel.ep_size=8", "train.precision=bf16")
    sequences, _ = rank_share(config, 8)
    rows = 8 * sequences * config.seq_len * 2  # two experts on each rank: a token may choose both
    bound = memory_bound(config, 8)
    assert (bound.rows, bound.limited) == (rows, False)
    assert memory_bound(configured("+moe=16e", "parallel.ep_size=16"), 16).rows == 16 * 65536 // 16
    assert f"{rows:,} rows" in str(bound)


def test_the_bound_is_lowered_by_rows_limit_recompute_and_capacity() -> None:
    plain = memory_bound(configured("+moe=16e", "parallel.ep_size=8"), 8)
    limited = memory_bound(configured("+moe=16e", "parallel.ep_size=8", "parallel.rows_limit=4096"), 8)
    assert (limited.rows, limited.limited) == (4096, True)
    assert limited.bytes * (plain.rows // limited.rows) == plain.bytes
    recomputed = memory_bound(configured("+moe=16e", "parallel.ep_size=8", "train.recompute=true"), 8)
    assert recomputed.rows == plain.rows
    assert recomputed.bytes < plain.bytes
    capacity = memory_bound(configured("+moe=gshard_512e", "parallel.ep_size=8"), 8)
    assert capacity.rows == 8 * 64 * 2 * 16  # P · E/P · 2·ceil(8192 / 512)
    assert memory_bound(configured(), 8).rows == 0


def test_a_fixed_capacity_is_received_whatever_the_tokens_choose() -> None:
    """Also where it has more places than there can be rows."""
    roomy = ("+moe=16e", "model.moe.capacity_factor=16", "parallel.ep_size=8")
    assert memory_bound(configured(*roomy), 8).rows == 8 * 8192 * 2
    bound = memory_bound(configured(*roomy, "parallel.fixed_capacity=true"), 8)
    assert bound.rows == 8 * 2 * 16 * 8192 * 2 // 16  # P · E/P · capacity
    assert "parallel.fixed_capacity" in str(bound)
    assert "rows_limit" not in str(bound)


def test_rows_that_a_limit_just_admits_are_kept_by_every_layer() -> None:
    """Such a layer goes at once, without rounds that recompute: two layers hold so many rows each."""
    config = configured("+moe=16e", "parallel.ep_size=8", "parallel.rows_limit=4096")
    sequences, _ = rank_share(config, 8)
    full, empty = (
        plan_memory(config, 8, Filling("uniform", 16, 8, 2, rows), sequences=sequences, micro_batches=1)
        for rows in (4096, 0)
    )
    kept, widest = row_bytes(config)
    assert full.activation_bytes - empty.activation_bytes == 2 * kept * 4096  # at the backward of the head
    assert memory_bound(config, 8).bytes == (2 * kept + widest) * 4096


KEPT = {
    "layernorm": ["model=125m", "model.dropout=0", "model.attention_dropout=0"],
    "gated": ["model=llama_1b", "model.max_seq_len=64"],
    "qk_norm": [],
    "sparse": ["+moe=16e"],
    "sparse_layernorm": ["+moe=64e_top8", "model.norm=layernorm"],
}
# never below what is kept, but for statistics of a few bytes a token; above it by the result of attention, which counts
# as computed and as laid out for the projection: on a CPU, where heads lie side by side already, they are one block
KEPT_LEAST, KEPT_MOST = 0.99, 1.11


def saved_by(run: object, parameters: set[int]) -> int:
    """Bytes that autograd keeps of `run()`, each block once, parameters left out."""
    blocks: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            blocks[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no address is used again
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = run()
    assert result is not None
    return sum(size for size, _ in blocks.values())


@pytest.mark.parametrize("name", KEPT)
def test_layers_keep_what_hooks_see(name: str) -> None:
    """One layer of each kind, and recomputed, with saved_tensors_hooks."""
    small = ["model.d_model=128", "model.d_ff=512", "model.num_layers=2", "model.num_heads=4", "data.seq_len=64"]
    config = compose([*KEPT[name], *small, "model.num_kv_heads=2", "model.vocab_size=301", "train.batch_tokens=256"])
    model = Transformer(config.model, backend="torch")
    model.reset_parameters(0)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    rotation = None
    if config.model.position == "rope":
        rotation = rotary_rotation(torch.arange(64)[None], config.model.head_width, config.model.rope_theta)
        parameters |= {part.untyped_storage().data_ptr() for part in rotation}
    options = {"rotation": rotation, "mask": None, "token_mask": None}
    planned = layer_bytes_alone(config, 4, device="cpu")
    for layer, expected in zip(model.layers, planned, strict=True):
        x = torch.randn(4, 64, 128, requires_grad=True)
        kept = saved_by(lambda layer=layer, x=x: layer(x, **options), parameters)
        assert KEPT_LEAST * kept <= expected.kept <= KEPT_MOST * kept
        again = saved_by(lambda layer=layer, x=x: checkpoint(layer, x, use_reentrant=False, **options), parameters)
        assert again == expected.between - expected.routing == x.numel() * 4


def test_alone_nothing_is_gathered_and_copies_are_kept() -> None:
    config = configured("train.batch_tokens=2048")
    alone, shared = (plan_memory(config, ranks, None, sequences=8, micro_batches=1) for ranks in (1, 2))
    assert alone.params == count_params(config.model).total
    assert alone.peak_bytes > shared.peak_bytes
    narrow = plan_memory(configured("train.precision=bf16"), 1, None, sequences=8, micro_batches=1)
    copies = 2 * alone.params
    assert narrow.activation_bytes > copies
    recomputed = plan_memory(configured("train.recompute=true"), 1, None, sequences=8, micro_batches=1)
    assert recomputed.activation_bytes < alone.activation_bytes


def test_offloaded_shards_leave_the_device() -> None:
    config = configured("+moe=16e", "parallel.ep_size=4")
    offloaded = replace(config, parallel=replace(config.parallel, cpu_offload=True))
    load = RoutingLoad("uniform", 16, 4, 2)
    for micro_batches in (1, 3):
        here, there = (
            plan_memory(each, 8, load, sequences=4, micro_batches=micro_batches) for each in (config, offloaded)
        )
        assert there.host_bytes == here.param_bytes + here.gradient_bytes + here.optimizer_bytes
        left = here.peak_bytes - here.param_bytes - here.optimizer_bytes
        left -= here.gradient_bytes if micro_batches == 3 else 0  # of one micro-batch they come after the peak
        largest = max(group.padded_shard for group in parameter_groups(config.model, config.parallel, 8))
        assert there.peak_bytes == left + 4 * largest  # the shard that comes from the host
