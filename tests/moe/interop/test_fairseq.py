"""Files of fairseq's format that the test writes itself, and a MoE layer against a float64 loop over tokens."""

from __future__ import annotations

import argparse
import pickle
import re
import shutil
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor

from moe.interop.fairseq import (
    expert_tensors,
    from_fairseq,
    load_fairseq,
    moe_layer_names,
    to_fairseq,
)
from moe.layers import GShardRouter, MoE, gshard_load_balance_loss

D, FF, E = 6, 10, 4
LAYERS = ("decoder.layers.1.moe_layer", "decoder.layers.3.moe_layer")
GATE = f"{LAYERS[0]}.gate.wg.weight"
FIRST = f"{LAYERS[0]}.experts.0.fc1.weight"
TOLERANCE = 1e-12  # of the largest entry, float64


def global_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """A decoder's tensors as the tests expect them back: shared ones first, then experts rank after rank."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    tensors = {"decoder.embed_tokens.weight": draw(11, D), "decoder.layers.0.fc1.weight": draw(FF, D)}
    tensors |= {f"{layer}.gate.wg.weight": draw(E, D) for layer in LAYERS}
    for e in range(E):
        for layer in LAYERS:
            tensors |= {
                f"{layer}.experts.{e}.fc1.weight": draw(FF, D),
                f"{layer}.experts.{e}.fc1.bias": draw(FF),
                f"{layer}.experts.{e}.fc2.weight": draw(D, FF),
                f"{layer}.experts.{e}.fc2.bias": draw(D),
            }
    return tensors


def beside_the_model() -> dict[str, object]:
    """What fairseq writes along: a namespace, a configuration, meters with numpy's numbers, the optimizer's state."""
    return {
        "args": argparse.Namespace(arch="transformer_lm_gpt", moe_freq=2, nested=argparse.Namespace(lr=[0.1])),
        "cfg": OmegaConf.create({"model": {"moe_expert_count": E, "names": ["a", None]}, "copy": "${model}"}),
        "optimizer_history": [{"num_updates": 3, "lr_scheduler_state": {"best": np.float64(2.5)}}],
        "extra_state": {"metrics": [(0, "ppl", defaultdict(list))], "counts": np.arange(3), "val_loss": np.float32(1)},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1}]},
    }


def local_name(name: str, num_files: int) -> tuple[int, str]:
    """The file of an expert's tensor and its name there."""
    match = re.search(r"experts\.(\d+)\.", name)
    block = E // num_files
    e = int(match[1])
    return e // block, name.replace(match[0], f"experts.{e % block}.")


def contents(num_files: int, tensors: dict[str, Tensor] | None = None) -> dict[str, dict[str, Tensor]]:
    """File ending -> the tensors in it."""
    files: dict[str, dict[str, Tensor]] = {"shared": OrderedDict()}
    files |= {f"rank-{rank}": OrderedDict() for rank in range(num_files)}
    for name, tensor in (tensors or global_tensors()).items():
        if "expert" in name:
            rank, local = local_name(name, num_files)
            files[f"rank-{rank}"][local] = tensor
        else:
            files["shared"][name] = tensor
    return files


def write(folder: Path, files: dict[str, dict[str, Tensor]], **options: object) -> Path:
    for ending, model in files.items():
        torch.save({"model": model, **beside_the_model()}, folder / f"model-{ending}.pt", **options)
    return folder / "model"


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(actual) == list(expected)
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("num_files", [1, 2, 4])
def test_experts_are_numbered_over_the_layer(tmp_path: Path, num_files: int, legacy: bool) -> None:
    prefix = write(tmp_path, contents(num_files), _use_new_zipfile_serialization=not legacy)
    assert_same(load_fairseq(prefix), global_tensors())
    assert_same(load_fairseq(f"{prefix}.pt"), global_tensors())  # as fairseq's own command line has it


@pytest.mark.parametrize("num_files", [1, 4])
def test_any_number_of_ranks_takes_its_part(tmp_path: Path, num_files: int) -> None:
    tensors = load_fairseq(write(tmp_path, contents(num_files)))
    for num_ranks in (1, 2, 4):
        for rank in range(num_ranks):
            assert_same(expert_tensors(tensors, rank, num_ranks), contents(num_ranks)[f"rank-{rank}"])
    for rank in range(8):  # more ranks than experts: replicas, expert r % E
        assert_same(expert_tensors(tensors, rank, 8), contents(4)[f"rank-{rank % 4}"])
    with pytest.raises(ValueError, match=r"4 experts of .* and num_ranks \(3\) one must be a multiple"):
        expert_tensors(tensors, 0, 3)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=rf"rank \({rank}\)"):
            expert_tensors(tensors, rank, 2)


def test_odd_names_are_paths_not_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]"
    folder.mkdir()
    for file in write(tmp_path, contents(2)).parent.glob("model-*.pt"):
        shutil.move(file, folder / file.name.replace("model", "ck*[2]pt"))
    assert_same(load_fairseq(folder / "ck*[2]pt"), global_tensors())
    for neighbour in ("ckx2pt-shared-shard0.pt", "ckx2pt-rank-7.pt"):  # what the name would match as a pattern
        (folder / neighbour).touch()
    assert_same(load_fairseq(folder / "ck*[2]pt"), global_tensors())


class Evil:
    """Runs a program when it is unpickled by the ordinary way."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["model", "args", "cfg"])
def test_a_pickle_with_another_name_is_refused_and_not_run(tmp_path: Path, place: str, legacy: bool) -> None:
    prefix = write(tmp_path, contents(2))
    marker, bad = tmp_path / "was_here", tmp_path / "model-rank-1.pt"
    torch.save({"model": {}, place: Evil(marker)}, bad, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"model-rank-1\.pt is refused: its pickle names posix\.mkdir"):
        load_fairseq(prefix)
    assert not marker.exists()
    torch.load(bad, weights_only=False)
    assert marker.exists()  # the file is what it claims to be


class Harmless:
    """A class of this test: not dangerous, not known either."""


def test_every_refused_name_is_listed(tmp_path: Path) -> None:
    prefix = write(tmp_path, contents(1))
    torch.save({"model": {}, "args": [Harmless(), Fraction(1, 3)]}, tmp_path / "model-shared.pt")
    with pytest.raises(ValueError, match=r"names fractions\.Fraction, .*test_fairseq\.Harmless"):
        load_fairseq(prefix)


def test_what_is_ignored_is_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even omegaconf's classes run: a configuration can carry resolvers, and names may change with versions."""

    def refuse(*_: object) -> None:
        raise AssertionError("was called")

    prefix = write(tmp_path, contents(1))
    monkeypatch.setattr("omegaconf.DictConfig.__setstate__", refuse)
    monkeypatch.setattr("argparse.Namespace.__init__", refuse)
    assert_same(load_fairseq(prefix), global_tensors())
    with pytest.raises(AssertionError, match="was called"):
        torch.load(f"{prefix}-rank-0.pt", weights_only=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError"),
        (b"not a pickle", "Unsupported operand"),
        (pickle.dumps(3, 2), "magic number"),
        (pickle.dumps({"model": {}}, 2)[:-3], "UnpicklingError|EOFError|IndexError"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    prefix = write(tmp_path, contents(1))
    (tmp_path / "model-rank-0.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"model-rank-0\.pt .*({reason})") as caught:
        load_fairseq(prefix)
    assert "weights_only" not in str(caught.value)  # torch's advice to load it anyway is not passed on


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([], "must hold a dictionary whose entry 'model' is"),
        ({"args": None}, "must hold a dictionary whose entry 'model' is"),
        ({"model": {"a": 3}}, "'a' under 'model' is a int"),
        ({"model": {3: torch.ones(1)}}, "3 under 'model'"),
        ({"model": {"a": argparse.Namespace()}}, "'a' under 'model'"),
    ],
)
def test_what_is_under_model_must_be_tensors(tmp_path: Path, state: object, message: str) -> None:
    prefix = write(tmp_path, contents(1))
    torch.save(state, tmp_path / "model-shared.pt")
    with pytest.raises(ValueError, match=message):
        load_fairseq(prefix)


def drop_experts(files: dict, ending: str, e: int) -> None:
    for name in [name for name in files[ending] if f".experts.{e}." in name]:
        del files[ending][name]


def rename(files: dict, ending: str, old: str, new: str) -> None:
    files[ending][new] = files[ending].pop(old)


FAULTS: dict[str, tuple[int, Callable[[dict], object], str]] = {
    "no_shared": (2, lambda f: f.pop("shared"), r"model-shared\.pt is missing"),
    "no_ranks": (1, lambda f: f.pop("rank-0"), r"missing: .*model-rank-0\.pt"),
    "gap": (4, lambda f: (f.pop("rank-1"), f.pop("rank-2")), r"missing: .*model-rank-1\.pt, .*model-rank-2\.pt"),
    "no_last_rank": (
        4,
        lambda f: f.pop("rank-3"),
        r"decoder\.layers\.1\.moe_layer lacks expert 3; .*is .*model-rank-3\.pt missing",
    ),
    "gap_in_a_file": (1, lambda f: drop_experts(f, "rank-0", 1), r"rank-0\.pt lacks decoder.*\.experts\.1"),
    "uneven_files": (
        2,
        lambda f: drop_experts(f, "rank-1", 1),
        r"rank-1\.pt and .*rank-0\.pt must hold equally many experts",
    ),
    "no_last_expert": (1, lambda f: drop_experts(f, "rank-0", 3), "lacks expert 3"),
    "replicas": (
        4,
        lambda f: f.update({"rank-4": f["rank-0"], "rank-5": f["rank-1"]}),
        r"has 4 experts, so that expert 4, expert 5 must be copies",
    ),
    "two_names_of_a_rank": (
        2,
        lambda f: f.update({"rank-01": f["rank-1"]}),
        r"rank-01\.pt and .*rank-1\.pt both belong to rank 1",
    ),
    "shared_in_rank": (
        2,
        lambda f: f["rank-1"].update({"decoder.norm.weight": torch.ones(D)}),
        r"rank-1\.pt holds tensors that belong to no expert: decoder\.norm\.weight",
    ),
    "id_with_a_zero": (1, lambda f: rename(f, "rank-0", FIRST, FIRST.replace(".0.", ".00.")), r"experts\.00\.fc1"),
    "expert_in_shared": (2, lambda f: f["shared"].update({FIRST: torch.ones(FF, D)}), rf"shared\.pt holds {FIRST}"),
    "no_gate": (2, lambda f: f["shared"].pop(GATE), rf"experts of {LAYERS[0]}, but the tensor {GATE} is missing"),
    "flat_gate": (2, lambda f: f["shared"].update({GATE: torch.ones(E)}), r"\(4,\) must be \(E, D\)"),
    "missing_tensor": (
        2,
        lambda f: f["rank-1"].pop(FIRST),
        r"have the same tensors; missing: .*\.experts\.2\.fc1\.weight",
    ),
    "extra_tensor": (
        2,
        lambda f: f["rank-0"].update({FIRST.replace("fc1", "fc3"): torch.ones(1)}),
        r"have the same tensors; missing: .*\.experts\.1\.fc3\.weight",
    ),
    "shard": (2, lambda f: f.update({"rank-0-shard0": {}}), r"rank-0-shard0\.pt is a shard"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tmp_path: Path, fault: str) -> None:
    num_files, spoil, message = FAULTS[fault]
    files = contents(num_files)
    spoil(files)
    with pytest.raises(ValueError, match=message):
        load_fairseq(write(tmp_path, files))


def test_expert_centroids_are_shared(tmp_path: Path) -> None:
    files = contents(2)
    files["shared"]["decoder.expert_centroids"] = torch.ones(E, D)
    assert "decoder.expert_centroids" in load_fairseq(write(tmp_path, files))


def slow_layer(tensors: dict[str, Tensor], name: str, x: Tensor, capacity: int | None) -> tuple[Tensor, Tensor]:
    """Artetxe et al. 2021 with the paper's settings, one token at a time: the output and l_aux."""
    probs = (x @ tensors[f"{name}.gate.wg.weight"].T).softmax(dim=1)
    order = probs.argsort(dim=1, descending=True)[:, :2].tolist()
    kept = [[False, False] for _ in order]
    taken = [0] * E
    for k in range(2):  # all first choices before any second one
        for t, pair in enumerate(order):
            kept[t][k] = capacity is None or taken[pair[k]] < capacity
            taken[pair[k]] += 1
    rows = []
    for t, token in enumerate(x):
        experts = [e for e, keep in zip(order[t], kept[t], strict=True) if keep]
        y = torch.zeros(D, dtype=x.dtype)
        for e in experts:
            w = {n: tensors[f"{name}.experts.{e}.{n}"] for n in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")}
            hidden = F.gelu(w["fc1.weight"] @ token + w["fc1.bias"])
            y = y + probs[t, e] / sum(probs[t, i] for i in experts) * (w["fc2.weight"] @ hidden + w["fc2.bias"])
        rows.append(y)
    first = torch.tensor([sum(pair[0] == e for pair in order) / len(order) for e in range(E)], dtype=x.dtype)
    return torch.stack(rows), E * (probs.mean(dim=0) * first).sum()


def assert_near(actual: Tensor, expected: Tensor) -> None:
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_what_fairseq_says(tmp_path: Path, name: str, training: bool) -> None:
    """Output, l_aux and every gradient; capacity 2·ceil(13/4) = 8 in training."""
    tensors = load_fairseq(write(tmp_path, contents(2)))
    assert moe_layer_names(tensors) == list(LAYERS)
    layer = from_fairseq(tensors, name).train(training)
    leaves = {n: t.clone().requires_grad_() for n, t in tensors.items() if n.startswith(name)}
    made = torch.randn(13, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = made + 0.5 * tensors[f"{name}.gate.wg.weight"][:2].sum(dim=0)  # two experts are crowded
    x, their_x = made.clone().requires_grad_(), made.clone().requires_grad_()
    y, routing = layer(x)
    balance = gshard_load_balance_loss(routing)
    expected, loss = slow_layer(leaves, name, their_x, 8 if training else None)
    assert routing.kept.all() == (not training)
    assert_near(y, expected)
    assert_near(balance, loss)
    (y.square().sum() + balance).backward()
    (expected.square().sum() + loss).backward()
    assert_near(x.grad, their_x.grad)
    assert_near(layer.router.weight.grad, leaves[f"{name}.gate.wg.weight"].grad)
    for ours, theirs in (("w_in", "fc1.weight"), ("b_in", "fc1.bias"), ("w_out", "fc2.weight"), ("b_out", "fc2.bias")):
        grads = [leaves[f"{name}.experts.{e}.{theirs}"].grad for e in range(E)]
        assert_near(getattr(layer.experts, ours).grad, torch.stack(grads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip_is_bitwise(dtype: torch.dtype, bias: bool) -> None:
    name = LAYERS[1]
    tensors = {n: t for n, t in global_tensors(dtype).items() if n.startswith(name) and (bias or "bias" not in n)}
    tensors[f"{name}.gate.wg.weight"] = tensors[f"{name}.gate.wg.weight"].float()  # each keeps its own dtype
    random = torch.get_rng_state()
    layer = from_fairseq(tensors, name)
    assert torch.equal(torch.get_rng_state(), random)  # converting draws nothing
    again = to_fairseq(layer, name)
    assert set(again) == set(tensors)
    assert_same({n: again[n] for n in tensors}, tensors)
    back = from_fairseq(again, name).state_dict()
    assert all(torch.equal(back[n], t) for n, t in layer.state_dict().items())
    before = {n: t.clone() for n, t in back.items()}
    for tensor in [*again.values(), *tensors.values()]:
        tensor.zero_()
    assert all(torch.equal(before[n], t) for n, t in layer.state_dict().items())  # copies
    assert all(torch.equal(before[n], t) for n, t in back.items())


def test_options_reach_the_layer() -> None:
    layer = from_fairseq(
        global_tensors(),
        LAYERS[0],
        activation="relu",
        dropout=0.1,
        second_policy="random",
        eval_capacity_fraction=0.05,
        eval_as_original=True,
    )
    router = layer.router
    assert (layer.experts.activation, layer.experts.dropout, router.rules) == ("relu", 0.1, "fairseq")
    assert (router.second_policy, router.eval_capacity_fraction, router.eval_as_original) == ("random", 0.05, True)
    assert from_fairseq(global_tensors(), LAYERS[0]).router.second_policy == "all"


@pytest.mark.parametrize(
    ("changes", "messages"),
    [
        (
            {GATE: None},
            ["there is no MoE layer 'decoder.layers.1.moe_layer'", "the MoE layers are: decoder.layers.3.moe_layer"],
        ),
        ({FIRST: None}, [f"{FIRST} must both be there"]),
        ({FIRST.replace(".0.", ".2."): None}, [r"missing: decoder\.layers\.1\.moe_layer\.experts\.2\.fc1\.weight"]),
        ({FIRST.replace("weight", "bias"): None}, [r"missing: .*\.experts\.0\.fc1\.bias"]),
        ({f"{LAYERS[0]}.extra": torch.ones(1)}, [r"unused: decoder\.layers\.1\.moe_layer\.extra"]),
        ({FIRST.replace("fc1", "fc3"): torch.ones(1)}, [r"unused: .*\.experts\.0\.fc3\.weight"]),
        ({FIRST.replace(".0.", ".9."): torch.ones(FF, D)}, [r"unused: .*\.experts\.9\.fc1"]),
        ({FIRST.replace(".0.", ".1."): torch.ones(FF, D + 1).double()}, [r"misshaped: .* \(10, 7\) must be \(10, 6\)"]),
        ({FIRST.replace(".0.", ".1."): torch.ones(FF, D)}, [r"of another dtype: .*\.experts\.1\.fc1\.weight"]),
    ],
)
def test_a_layer_that_is_not_whole_is_refused(changes: dict[str, Tensor | None], messages: list[str]) -> None:
    tensors = global_tensors() | changes
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    for message in messages:
        with pytest.raises(ValueError, match=message):
            from_fairseq(tensors, LAYERS[0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: MoE(D, FF, E), "TopKRouter"),
        (lambda: MoE(D, FF, E, router=GShardRouter(D, E, rules="fairscale")), "rules=fairscale"),
        (lambda: MoE(D, FF, E, router=GShardRouter(D, E), gated=True), "gated"),
        (lambda: MoE(D, FF, E, router=GShardRouter(D, E), shared_d_ff=3), "shared"),
    ],
)
def test_what_fairseq_cannot_express_is_refused(layer: Callable[[], MoE], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_fairseq(layer(), "decoder.layers.1.moe_layer")
