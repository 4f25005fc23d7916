from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from moe.layers.attention import Attention, LayerCache
from moe.layers.initialization import WeightInit
from moe.layers.position import rotary_rotation, rotate


def looped(attention: Attention, x: Tensor) -> Tensor:
    """Causal attention, one query and one head at a time."""
    queries, keys, values = attention.qkv(x).split(
        [attention.query_width, attention.kv_width, attention.kv_width], dim=-1
    )
    if attention.qk_norm == "full":
        queries, keys = attention.q_norm(queries), attention.k_norm(keys)
    width, group = attention.head_dim, attention.num_heads // attention.num_kv_heads
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            heads = []
            for h in range(attention.num_heads):
                g = h // group
                query = queries[b, t, h * width : (h + 1) * width]
                key = keys[b, : t + 1, g * width : (g + 1) * width]
                if attention.qk_norm == "head":
                    query, key = attention.q_norm(query), attention.k_norm(key)
                probs = (key @ query / math.sqrt(width)).softmax(0)
                heads.append(probs @ values[b, : t + 1, g * width : (g + 1) * width])
            rows.append(torch.cat(heads))
    return attention.out(torch.stack(rows).view(*x.shape[:2], -1))


@pytest.mark.parametrize("qk_norm", [None, "head", "full"])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 3, None), (4, 2, 3), (4, 1, 5)])
def test_equals_a_loop_with_every_gradient(
    num_heads: int, num_kv_heads: int, head_dim: int | None, qk_norm: str | None
) -> None:
    attention = Attention(
        12, num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=True, qk_norm=qk_norm, dtype=torch.float64
    )
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    inputs = [x, *attention.parameters()]
    weights = torch.randn(2, 5, 12, dtype=torch.float64)
    actual, expected = attention(x), looped(attention, x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    for a, e in zip(
        torch.autograd.grad((actual * weights).sum(), inputs),
        torch.autograd.grad((expected * weights).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-10)


def test_one_position_more_sees_the_whole_cache() -> None:
    """Without a mask: torch's causal one would let it see the first key alone."""
    attention = Attention(12, 4, num_kv_heads=2, head_dim=4, dtype=torch.float64)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    cache = LayerCache(*(torch.full((2, 2, 6, 4), math.nan, dtype=torch.float64) for _ in range(2)))
    parts = [attention(x[:, :3], cache=cache)]
    parts += [attention(x[:, i : i + 1], cache=cache, cache_length=i) for i in (3, 4, 5)]
    torch.testing.assert_close(torch.cat(parts, dim=1), looped(attention, x), rtol=1e-9, atol=1e-11)


def test_several_positions_that_continue_a_cache_need_a_mask() -> None:
    attention = Attention(12, 4)
    cache = LayerCache(torch.zeros(1, 4, 6, 3), torch.zeros(1, 4, 6, 3))
    with pytest.raises(ValueError, match="2 positions that follow 3 cached ones need `mask`"):
        attention(torch.zeros(1, 2, 12), cache=cache, cache_length=3)


def test_cache_equals_the_whole_sequence() -> None:
    attention = Attention(12, 4, num_kv_heads=2, head_dim=4, dtype=torch.float64)
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    positions = torch.arange(6)[None]
    whole = attention(x, rotation=rotary_rotation(positions, 4, 100.0))
    cache = LayerCache(*(torch.full((2, 2, 6, 4), math.nan, dtype=torch.float64) for _ in range(2)))
    parts = []
    for start, end in ((0, 3), (3, 4), (4, 6)):
        mask = torch.arange(end)[None, :] <= torch.arange(start, end)[:, None]
        rotation = rotary_rotation(positions[:, start:end], 4, 100.0)
        parts.append(attention(x[:, start:end], rotation=rotation, mask=mask, cache=cache, cache_length=start))
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-7)  # rotate works in float32


def test_fairseq_initialisation_is_xavier_of_each_matrix() -> None:
    attention = Attention(64, 4, num_kv_heads=2, bias=True)
    attention.reset_parameters(seed=3, init=WeightInit("fairseq"))
    query, key, _ = attention.qkv.weight.detach().split([64, 32, 32])
    assert query.abs().max() <= (6 / 128 / 2) ** 0.5
    assert query.abs().max() > 0.98 * (6 / 128 / 2) ** 0.5
    assert key.abs().max() > 0.98 * (6 / 96 / 2) ** 0.5
    assert attention.out.weight.abs().max() > 0.98 * (6 / 128) ** 0.5
    assert not attention.qkv.bias.any()


def test_initialisation_follows_seed_and_layer_alone() -> None:
    first, second = Attention(16, 2), Attention(16, 2)
    first.reset_parameters(seed=1, layer=4)
    torch.randn(100)
    second.reset_parameters(seed=1, layer=4)
    assert torch.equal(first.qkv.weight, second.qkv.weight)
    second.reset_parameters(seed=1, layer=5)
    assert not torch.equal(first.qkv.weight, second.qkv.weight)


def test_rotation_keeps_the_dtype() -> None:
    x = torch.randn(1, 1, 3, 4, dtype=torch.bfloat16)
    assert rotate(x, rotary_rotation(torch.arange(3)[None], 4, 10.0)).dtype == torch.bfloat16
