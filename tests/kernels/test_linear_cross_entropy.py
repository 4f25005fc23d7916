"""The fused head against F.cross_entropy of whole logits in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moe.kernels.linear_cross_entropy import linear_cross_entropy, op, torch_impl

Compare = Callable[[Tensor, Tensor], None]


def problem(t: int, v: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t + v)
    hidden = torch.randn(t, 6, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, 6, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, weight, torch.randint(v, (t,), generator=generator)


def oracle(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [tensor.double().detach().requires_grad_() for tensor in (hidden, weight)]
    losses = F.cross_entropy(leaves[0] @ leaves[1].T, targets, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses, leaves, upstream.double())]


@pytest.mark.parametrize(
    "t", [1, torch_impl.CHUNK_TOKENS, torch_impl.CHUNK_TOKENS + 3, 2 * torch_impl.CHUNK_TOKENS + 1]
)
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_losses_and_both_gradients(
    t: int, backend: str, dtype: torch.dtype, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    hidden, weight, targets = problem(t, 11, dtype)
    upstream = torch.linspace(-1, 2, t, dtype=torch.promote_types(dtype, torch.float32))
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses = linear_cross_entropy(*leaves, targets, backend=backend)
    gradients = torch.autograd.grad(losses, leaves, upstream)
    expected = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    for actual, reference in zip([losses.detach().to(dtype), *gradients], expected, strict=True):
        assert actual.dtype == dtype
        assert_equal_to_scale(actual, reference)


TOKENS = torch_impl.CHUNK_TOKENS + 3
UPSTREAM = {
    "mean": torch.full((TOKENS,), 0.25),
    "expanded": torch.tensor(0.25).expand(TOKENS),
    "zero": torch.zeros(TOKENS),
    "mean of the counted": torch.where(torch.arange(TOKENS) % 3 > 0, 0.25, 0.0),
    "first differs": torch.cat([torch.tensor([3.0]), torch.ones(TOKENS - 1)]),
    "last differs": torch.cat([torch.ones(TOKENS - 1), torch.tensor([3.0])]),
    "weighted": torch.linspace(-1, 2, TOKENS),
}
MASKS = {
    "no mask": None,
    "a third masked": torch.arange(TOKENS) % 3 > 0,
    "all masked": torch.zeros(TOKENS, dtype=torch.bool),
}


@pytest.mark.parametrize("upstream", UPSTREAM.values(), ids=UPSTREAM.keys())
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_any_upstream_gradient_is_right_whatever_the_mask_says(
    upstream: Tensor, mask: Tensor | None, assert_equal_to_scale: Compare, poisoned_memory: None
) -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses = linear_cross_entropy(*leaves, targets, token_mask=mask, backend="torch")
    gradients = torch.autograd.grad(losses, leaves, upstream)
    for actual, reference in zip([losses.detach(), *gradients], oracle(hidden, weight, targets, upstream), strict=True):
        assert_equal_to_scale(actual, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradient_of_a_mean_is_right_and_makes_no_logits_again(
    dtype: torch.dtype, assert_equal_to_scale: Compare, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, targets = problem(TOKENS, 11, dtype)
    mask = MASKS["a third masked"]
    upstream = (mask * 0.3).to(torch.promote_types(dtype, torch.float32))  # 0.3 is no power of two
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    masked = linear_cross_entropy(*leaves, targets, token_mask=mask, backend="torch")
    plain = linear_cross_entropy(*leaves, targets, backend="torch")
    if dtype != torch.float16:  # there the backward does it all
        monkeypatch.setattr(torch_impl, "_chunks", None)
    for losses, arriving in ((masked, upstream), (plain, torch.full_like(upstream, 0.3))):
        gradients = torch.autograd.grad(losses, leaves, arriving)
        for actual, reference in zip(gradients, oracle(hidden, weight, targets, arriving)[1:], strict=True):
            assert actual.dtype == dtype
            assert_equal_to_scale(actual, reference)


def test_tokens_that_do_not_count_leave_no_trace_in_the_gradient_of_weight() -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    mask, others = MASKS["a third masked"], hidden.clone()
    others[~mask] += 7.0
    gradients = []
    for each in (hidden, others):
        leaf = weight.clone().requires_grad_()
        losses = linear_cross_entropy(each, leaf, targets, token_mask=mask, backend="torch")
        gradients.append(torch.autograd.grad(torch.where(mask, losses, 0.0).sum(), leaf)[0])
    assert torch.equal(*gradients)


def test_backward_can_be_repeated_with_another_upstream_gradient(assert_equal_to_scale: Compare) -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    losses = linear_cross_entropy(*leaves, targets, backend="torch")
    for name in ("mean", "weighted", "expanded", "mean"):
        gradients = torch.autograd.grad(losses, leaves, UPSTREAM[name], retain_graph=True)
        for actual, reference in zip(gradients, oracle(hidden, weight, targets, UPSTREAM[name])[1:], strict=True):
            assert_equal_to_scale(actual, reference)
            actual.fill_(float("nan"))  # the caller's own: what is kept must not share its memory


def test_torch_func_differentiates_it(assert_equal_to_scale: Compare) -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    for name in ("mean", "weighted"):
        losses, pull_back = torch.func.vjp(lambda h, w: linear_cross_entropy(h, w, targets), hidden, weight)
        expected = oracle(hidden, weight, targets, UPSTREAM[name])
        for actual, reference in zip([losses, *pull_back(UPSTREAM[name])], expected, strict=True):
            assert_equal_to_scale(actual, reference)


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("upstream", ["mean", "weighted"])
@pytest.mark.parametrize("compiled", [False, True])
def test_only_the_gradients_wanted_compiled_or_not(
    wanted: tuple[bool, bool], upstream: str, compiled: bool, assert_equal_to_scale: Compare
) -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)

    def mean_or_weighted(hidden: Tensor, weight: Tensor, upstream: Tensor) -> Tensor:
        return (linear_cross_entropy(hidden, weight, targets, backend="torch") * upstream).sum()

    function = torch.compile(mean_or_weighted, fullgraph=True, backend="aot_eager") if compiled else mean_or_weighted
    leaves = [tensor.clone().requires_grad_(wants) for tensor, wants in zip((hidden, weight), wanted, strict=True)]
    function(*leaves, UPSTREAM[upstream]).backward()
    for leaf, wants, reference in zip(
        leaves, wanted, oracle(hidden, weight, targets, UPSTREAM[upstream])[1:], strict=True
    ):
        assert (leaf.grad is not None) == wants
        if leaf.grad is not None:
            assert_equal_to_scale(leaf.grad, reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (False, True), (True, False), (False, False)], ids=str)
def test_compilers_are_told_what_shapes_come_out(wanted: tuple[bool, bool], dtype: torch.dtype) -> None:
    inputs, checks = problem(5, 11, dtype), ("test_schema", "test_faketensor")
    arguments = (*inputs, "torch", None, *wanted)
    torch.library.opcheck(op._linear_cross_entropy, arguments, test_utils=checks)
    losses, *made = op._linear_cross_entropy(*arguments)
    torch.library.opcheck(
        op._linear_cross_entropy_backward, (losses, *inputs, None, *made, "torch", *wanted), test_utils=checks
    )


class Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, and the products computed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.products = 0

    def __torch_dispatch__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.numel())
        return out


@pytest.mark.parametrize("upstream", ["mean", "weighted"])
def test_the_logits_of_all_tokens_never_exist(upstream: str) -> None:
    inputs, both = problem(TOKENS, 11, torch.float32), {"for_hidden": True, "for_weight": True}
    with Sizes() as sizes:  # the backward's op is one operation to it, hence what is within
        *_, unit_hidden, unit_weight = torch_impl.forward(*inputs, None, **both)
        torch_impl.backward(UPSTREAM[upstream], *inputs, None, (unit_hidden, unit_weight), **both)
    assert sizes.largest == torch_impl.CHUNK_TOKENS * 11 < TOKENS * 11
    assert sizes.products == 2 * (3 if upstream == "mean" else 5)  # in two chunks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_what_is_kept_is_what_the_docstring_says(dtype: torch.dtype, wanted: tuple[bool, bool]) -> None:
    hidden, weight, targets = problem(TOKENS, 11, dtype)
    hidden.requires_grad_(wanted[0])
    weight.requires_grad_(wanted[1])
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        linear_cross_entropy(hidden, weight, targets, token_mask=MASKS["a third masked"], backend="torch")
    wide = torch.promote_types(dtype, torch.float32)
    own = TOKENS * wide.itemsize  # the log-sum-exps
    if dtype != torch.float16:
        own += wanted[0] * hidden.nbytes + wanted[1] * weight.numel() * wide.itemsize
    inputs = hidden.nbytes + weight.nbytes + targets.nbytes + TOKENS
    assert sum(tensor.nbytes for tensor in kept) == (inputs + own if any(wanted) else 0)


def test_losses_are_the_same_bits_with_and_without_gradients_and_cost_one_product_without() -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    with torch.no_grad(), Sizes() as sizes:
        losses = linear_cross_entropy(*leaves, targets, backend="torch")
    assert sizes.products == 2  # in two chunks
    assert torch.equal(losses, linear_cross_entropy(*leaves, targets, backend="torch").detach())


@pytest.mark.parametrize("mask", [None, torch.zeros(0, dtype=torch.bool)], ids=["no mask", "mask"])
def test_no_tokens_give_no_losses_and_zero_gradients(mask: Tensor | None) -> None:
    hidden, weight = torch.ones(0, 6, requires_grad=True), torch.ones(11, 6, requires_grad=True)
    losses = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), token_mask=mask, backend="torch")
    losses.sum().backward()
    assert losses.shape == (0,)
    assert hidden.grad.shape == (0, 6)
    assert torch.equal(weight.grad, torch.zeros(11, 6))


def test_an_upstream_nan_reaches_both_gradients() -> None:
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    upstream = torch.full((TOKENS,), float("nan"))
    for gradient in torch.autograd.grad(linear_cross_entropy(*leaves, targets), leaves, upstream):
        assert bool(gradient.isnan().all())


def test_large_logits_stay_finite() -> None:
    hidden, weight, targets = problem(4, 9, torch.float32)
    losses = linear_cross_entropy(hidden * 1e4, weight, targets)
    torch.testing.assert_close(losses, F.cross_entropy(hidden * 1e4 @ weight.T, targets, reduction="none"))


def test_autocast_computes_logits_in_its_dtype_and_losses_in_float32() -> None:
    hidden, weight, targets = problem(5, 9, torch.float32)
    weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(hidden, weight, targets)
    losses.sum().backward()
    assert losses.dtype == weight.grad.dtype == torch.float32
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    assert not torch.equal(losses, exact)
    torch.testing.assert_close(losses, exact, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("early", [True, False], ids=["made in the forward", "computed again"])
def test_autocast_gives_the_weights_gradient_in_its_own_dtype(
    early: bool, assert_equal_to_scale: Compare, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    monkeypatch.setattr(torch_impl, "_CHUNK_NUMBERS", 25)  # four of the vocabulary at a time
    hidden, weight, targets = problem(TOKENS, 11, torch.float32)
    leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    upstream = UPSTREAM["expanded" if early else "weighted"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = linear_cross_entropy(*leaves, targets)
        of_hidden, of_weight = torch.autograd.grad(losses, leaves, upstream)
    expected = oracle(hidden, weight, targets, upstream)
    assert losses.dtype == of_hidden.dtype == of_weight.dtype == torch.float32
    for found, reference in zip([losses.detach(), of_hidden, of_weight], expected, strict=True):
        assert_equal_to_scale(found.bfloat16(), reference)
    assert not torch.equal(of_weight, of_weight.bfloat16().float())  # the sum over tokens was never rounded


def test_bad_input_is_refused() -> None:
    hidden, weight, targets = problem(4, 9, torch.float32)
    for backend in ("torch", "reference"):
        with pytest.raises(ValueError, match=r"hidden \(torch.float32\) and weight \(torch.bfloat16\)"):
            linear_cross_entropy(hidden, weight.bfloat16(), targets, backend=backend)
    with pytest.raises(ValueError, match=r"weight \(9, 5\)"):
        linear_cross_entropy(hidden, weight[:, :5], targets)
    with pytest.raises(ValueError, match="targets"):
        linear_cross_entropy(hidden, weight, targets[:3])
    for mask in (torch.ones(3, dtype=torch.bool), torch.ones(4)):
        with pytest.raises(ValueError, match="token_mask"):
            linear_cross_entropy(hidden, weight, targets, token_mask=mask)
    for wrong in (-1, 9):
        with pytest.raises(ValueError, match=f"{wrong}"):
            linear_cross_entropy(hidden, weight, torch.full_like(targets, wrong))
