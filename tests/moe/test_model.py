from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from moe.config import ModelConfig
from moe.layers import load_balance_loss
from moe.model import Transformer

OPTIONS = {
    "plain": {},
    "sparse": {"sparse": True},
    "sparse_first": {"sparse": True, "moe_placement": "first", "expert_d_ff": 7},
    "paper": {
        "sparse": True,
        "norm": "layernorm",
        "position": "sinusoidal",
        "position_offset": 2,
        "bias": True,
        "scale_embeddings": True,
        "init": "fairseq",
    },
    "opt_350m": {
        "norm": "layernorm",
        "norm_position": "post",
        "position": "learned",
        "position_offset": 2,
        "bias": True,
        "activation": "relu",
        "embedding_dim": 8,
    },
    "modern": {"gated": True, "activation": "silu", "num_kv_heads": 1, "qk_norm": "head", "tie_embeddings": False},
    "olmoe": {"sparse": True, "gated": True, "activation": "silu", "qk_norm": "full", "tie_embeddings": False},
    "wide_heads": {"head_dim": 6},
}


@pytest.fixture(params=OPTIONS, ids=str)
def config(request: pytest.FixtureRequest, model_config: Callable[..., ModelConfig]) -> ModelConfig:
    return model_config(**OPTIONS[request.param])


def build(config: ModelConfig, **options: object) -> Transformer:
    model = Transformer(config, dtype=torch.float64, **options)
    model.reset_parameters(seed=0)
    return model


def some_tokens(config: ModelConfig, batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def test_losses_are_the_cross_entropy_of_the_logits_with_every_gradient(config: ModelConfig) -> None:
    model = build(config)
    tokens, targets = some_tokens(config), some_tokens(config).flip(0)
    losses = model(tokens, targets).token_losses
    expected = F.cross_entropy(model(tokens).logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 9)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)  # losses are float32
    weights = torch.rand(2, 9, dtype=torch.float64)
    parameters = list(model.parameters())
    actual = torch.autograd.grad((losses * weights).sum(), parameters)
    for gradient, reference in zip(actual, torch.autograd.grad((expected * weights).sum(), parameters), strict=True):
        assert reference.abs().max() > 0
        torch.testing.assert_close(gradient, reference, rtol=1e-5, atol=1e-6 * float(reference.abs().max()))


def test_future_tokens_change_nothing(config: ModelConfig) -> None:
    model = build(config).eval()
    tokens = some_tokens(config)
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % config.vocab_size
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :5], after[:, :5], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before[:, 5:], after[:, 5:], rtol=1e-3)


def test_cached_decoding_equals_the_whole_sequence(config: ModelConfig) -> None:
    model = build(config).eval()
    tokens = some_tokens(config)
    cache = model.new_cache(2, 9)
    parts = [model(tokens[:, start:end], cache=cache).logits for start, end in ((0, 4), (4, 5), (5, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens).logits, rtol=1e-5, atol=1e-6)


def test_a_padded_prompt_equals_the_prompt_alone(config: ModelConfig) -> None:
    model = build(config).eval()
    tokens = some_tokens(config)
    padded = torch.cat([tokens[:1, :3] * 0, tokens[:1, :6]], dim=1)  # three ids of padding, then six tokens
    cache = model.new_cache(2, 12, num_padding=torch.tensor([3, 0]))
    batch = model(torch.cat([padded, tokens[1:]]), cache=cache).logits
    alone = model(tokens[:1, :6]).logits
    torch.testing.assert_close(batch[:1, 3:], alone, rtol=1e-5, atol=1e-6)
    step = torch.tensor([[5], [6]])
    after = model(step, cache=cache).logits
    alone = model(torch.cat([tokens[:1, :6], step[:1]], dim=1)).logits
    torch.testing.assert_close(after[:1, -1], alone[:, -1], rtol=1e-5, atol=1e-6)


def test_documents_of_a_row_do_not_see_each_other(config: ModelConfig) -> None:
    model = build(config).eval()
    tokens = some_tokens(config, batch=1)
    packed = model(tokens, document_ids=torch.tensor([[0] * 4 + [1] * 5])).logits
    torch.testing.assert_close(packed[:, :4], model(tokens[:, :4]).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[:, 4:], model(tokens[:, 4:]).logits, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(packed[:, 4:], model(tokens).logits[:, 4:], rtol=1e-3)


def test_recompute_changes_no_gradient(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True, dropout=0.2, attention_dropout=0.1)
    gradients = []
    for recompute in (False, True):
        model = build(config, recompute=recompute)
        torch.manual_seed(7)
        output = model(some_tokens(config), some_tokens(config))
        (output.token_losses.mean() + output.routings[0].router_probs.square().mean()).backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-12, atol=1e-14)


def test_reference_and_fast_backend_agree(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True)
    outputs = [build(config, backend=name)(some_tokens(config), some_tokens(config)) for name in ("torch", "reference")]
    torch.testing.assert_close(outputs[0].token_losses, outputs[1].token_losses, rtol=1e-6, atol=1e-6)


def test_twins_share_every_weight_that_both_have(model_config: Callable[..., ModelConfig]) -> None:
    dense, sparse = (dict(build(model_config(sparse=s)).named_parameters()) for s in (False, True))
    shared = dense.keys() & sparse.keys()
    assert {"embedding.weight", "layers.1.attention.qkv.weight", "layers.0.feed_forward.w_in"} <= shared
    assert all(torch.equal(dense[name], sparse[name]) for name in shared)


def test_a_dense_model_has_no_routings_and_a_sparse_one_has_them_in_order(
    model_config: Callable[..., ModelConfig],
) -> None:
    config = model_config(sparse=True, moe_placement="first")
    assert config.moe_layers == (0, 2)
    assert len(build(config)(some_tokens(config)).routings) == 2
    assert build(model_config())(some_tokens(config)).routings == ()


def test_the_paper_puts_experts_into_odd_layers_and_the_last(model_config: Callable[..., ModelConfig]) -> None:
    assert model_config(sparse=True, num_layers=6).moe_layers == (1, 3, 5)


def test_padding_takes_no_capacity(model_config: Callable[..., ModelConfig]) -> None:
    config = model_config(sparse=True)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 4:] = False
    routing = build(config)(some_tokens(config), token_mask=mask).routings[0]
    assert int(routing.tokens_per_expert.sum()) == int(mask.sum()) * 2


def test_a_compiled_model_is_one_graph_for_every_length(model_config: Callable[..., ModelConfig]) -> None:
    model = build(model_config()).eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for length in (9, 7, 5):  # the second makes the length a symbol
        tokens = some_tokens(model.config, length=length)
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_a_sparse_model_compiles_whole_forward_and_backward(model_config: Callable[..., ModelConfig]) -> None:
    """In one graph for each of training's two kinds of length: the first, and any other."""
    torch._dynamo.reset()  # what it has seen of lengths in other tests changes the number of graphs
    model = build(model_config(sparse=True))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    parameters = list(model.parameters())
    for length in (9, 7, 5):
        tokens = some_tokens(model.config, length=length)
        ours, expected = (
            torch.autograd.grad(
                out.token_losses.mean() + load_balance_loss(out.routings[0]), parameters, allow_unused=True
            )
            for out in (compiled(tokens, tokens), model(tokens, tokens))
        )
        torch.testing.assert_close(ours, expected)
    assert counter.frame_count == 2


def test_a_model_without_a_vocabulary_is_refused(model_config: Callable[..., ModelConfig]) -> None:
    with pytest.raises(ValueError, match=r"model\.vocab_size is null"):
        Transformer(model_config(vocab_size=None))


def test_more_positions_than_there_is_room_for(model_config: Callable[..., ModelConfig]) -> None:
    """On a GPU an index beyond the table would end the process's context."""
    model = build(model_config(position="learned"))
    limit = model.config.max_seq_len
    tokens = some_tokens(model.config, length=limit + 1)
    told = rf"{limit + 1} positions exceed model.max_seq_len \({limit}\)"
    with pytest.raises(ValueError, match=told):
        model(tokens)
    with pytest.raises(ValueError, match=told):
        model(tokens, cache=model.new_cache(2, limit + 1))
    model(tokens, document_ids=torch.arange(limit + 1)[None].expand(2, -1) // 9)  # each restarts
    cache = model.new_cache(2, 6)
    model(tokens[:, :4], cache=cache)
    with pytest.raises(ValueError, match="holds 6 positions, of which 4 are filled: 3 more do not fit"):
        model(tokens[:, 4:7], cache=cache)
    with pytest.raises(ValueError, match="the cache has 2 sequences, but tokens has 1"):
        model(tokens[:1, 4:5], cache=cache)
    with pytest.raises(ValueError, match="token_mask and cache exclude each other"):
        model(tokens[:, 4:5], cache=cache, token_mask=torch.ones(2, 1, dtype=torch.bool))


@pytest.mark.parametrize("sparse", [False, True])
def test_inputs_of_another_shape_are_refused_by_name(model_config: Callable[..., ModelConfig], *, sparse: bool) -> None:
    model = build(model_config(sparse=sparse))
    tokens = some_tokens(model.config)
    with pytest.raises(ValueError, match=r"tokens \(9,\) must be \(B, S\)"):
        model(tokens[0])
    for name in ("targets", "document_ids", "token_mask", "loss_mask"):
        wrong = torch.ones(2, 8, dtype=torch.bool if name.endswith("mask") else torch.int64)
        with pytest.raises(ValueError, match=rf"{name} \(2, 8\) must have the shape of tokens, \(2, 9\)"):
            model(tokens, **({"targets": tokens} | {name: wrong}))
    for name in ("token_mask", "loss_mask"):
        with pytest.raises(ValueError, match=rf"{name} \(torch.int64\) must be bool"):
            model(tokens, tokens, **{name: torch.ones_like(tokens)})


def test_a_target_outside_the_vocabulary_says_that_masked_ones_need_an_id_too(
    model_config: Callable[..., ModelConfig],
) -> None:
    model = build(model_config())
    tokens = some_tokens(model.config)
    mask = torch.arange(9).expand(2, -1) < 5
    with pytest.raises(ValueError, match=r"targets run from -100 .* masked ones too .*masked_fill"):
        model(tokens, tokens.masked_fill(~mask, -100), loss_mask=mask)


def test_documents_and_cache_exclude_each_other(model_config: Callable[..., ModelConfig]) -> None:
    model = build(model_config())
    tokens = some_tokens(model.config)
    with pytest.raises(ValueError, match="exclude each other"):
        model(tokens, document_ids=torch.zeros_like(tokens), cache=model.new_cache(2, 9))
