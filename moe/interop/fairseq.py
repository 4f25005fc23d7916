"""Checkpoints of fairseq's moe branch (the paper's released models): safe reading, and one MoE layer to a MoE and back.

The format (facebookresearch/fairseq, fairseq/moe_checkpoint_utils.py): `<prefix>-shared.pt` holds all
tensors except the experts', gates included, and each `<prefix>-rank-<r>.pt` the experts of rank r, numbered from 0 in
every file. Expert i of rank r is expert r · (experts per rank) + i of the layer. The tensors are under "model", beside
the configuration, counters and optimizer state. Only "model" is used: **the optimizer's state is not read**, since
fairseq's own merging of ranks drops it too.

The files are pickles. They are read with torch's `weights_only` unpickler, which calls only what rebuilds tensors.
Other names in such files that are in IGNORED (argparse.Namespace, omegaconf's configurations, numpy's scalars) are not
imported or called either: an inert object replaces each. Any further name is refused, unless this process itself has
passed it to torch.serialization.add_safe_globals.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.layers import GShardRouter, MoE

IGNORED = (  # types that the configuration and counters beside the tensors may use
    "argparse.Namespace",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.base.Metadata",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.nodes.AnyNode",
    "typing.Any",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "int", "float", "str", "bool")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
)
_EXPERT = re.compile(r"(?P<layer>.+)\.experts\.(?P<id>0|[1-9]\d*)\.(?P<name>.+)")
_GLOBAL = re.compile(r"GLOBAL (\S+)")
_REASON = re.compile(r"WeightsUnpickler error:\s*(.+)")
_RANK_FILE = re.compile(r"-rank-(\d+)\.pt")
_TENSORS = {"fc1.weight": "w_in", "fc2.weight": "w_out", "fc1.bias": "b_in", "fc2.bias": "b_out"}
_GATE = "gate.wg.weight"


class _Inert:
    """Stands in for an object that is not needed: accepts any arguments and state, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


_STAND_INS: list[Any] = [(_Inert, name) for name in IGNORED]


def load_fairseq(prefix: str | Path) -> dict[str, Tensor]:
    """Load all tensors of a checkpoint under fairseq's names, with experts numbered over the whole layer.

    prefix: "dir/model" for dir/model-shared.pt and dir/model-rank-0.pt, ...; fairseq's "dir/model.pt" is equivalent.
    Tensors are memory-mapped where the file format allows, so nothing is copied until it is used.
    Raises ValueError for a missing file, a pickle that names anything but tensors and IGNORED, sharded files, missing,
    repeated or unequal experts, and names in the wrong file.
    """
    path = Path(str(prefix).removesuffix(".pt"))
    files = _find_files(path)
    shared = Path(f"{path}-shared.pt")
    tensors = _read_model(shared)
    for name in tensors:
        if "expert" in name and "expert_centroids" not in name:
            raise ValueError(f"{shared} holds {name}, which belongs in the file of a rank (-rank-R.pt)")
    counts: dict[str, int] = {}
    for rank, file in enumerate(files):
        local = _read_model(file)
        found = _count_experts(local, file)
        if rank == 0:
            counts = found
        elif found != counts:
            raise ValueError(
                f"{file} and {files[0]} must hold equally many experts of each layer, not {found} and {counts}"
            )
        for name, tensor in local.items():
            layer, e, rest = _parse(name)
            tensors[f"{layer}.experts.{rank * counts[layer] + e}.{rest}"] = tensor
    _check_experts(tensors, path, len(files))
    return tensors


def expert_tensors(tensors: Mapping[str, Tensor], rank: int, num_ranks: int) -> dict[str, Tensor]:
    """The experts of one rank of `num_ranks`, numbered from 0: the content of "model" in that rank's file.

    Rank r has the r-th of equal consecutive blocks; with more ranks than experts it has expert r % E.
    The tensors are not copied. Raises ValueError if neither number divides the other.
    """
    if not 0 <= rank < num_ranks:
        raise ValueError(f"rank ({rank}) must be at least 0 and below num_ranks ({num_ranks})")
    counts = {layer: len(found) for layer, found in _expert_names(tensors).items()}
    for layer, count in counts.items():
        if count % num_ranks != 0 and num_ranks % count != 0:
            raise ValueError(
                f"of the {count} experts of {layer} and num_ranks ({num_ranks}) one must be a multiple of the other"
            )
    local = {}
    for name, tensor in tensors.items():
        if _EXPERT.fullmatch(name):
            layer, e, rest = _parse(name)
            block = max(counts[layer] // num_ranks, 1)
            start = rank * block % counts[layer]
            if start <= e < start + block:
                local[f"{layer}.experts.{e - start}.{rest}"] = tensor
    return local


def moe_layer_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the MoE layers, such as "decoder.layers.1.moe_layer", in checkpoint order."""
    return [name.removesuffix(f".{_GATE}") for name in tensors if name.endswith(f".{_GATE}")]


def from_fairseq(
    tensors: Mapping[str, Tensor],
    name: str,
    *,
    activation: str = "gelu",
    dropout: float = 0.0,
    second_policy: str = "all",
    eval_capacity_fraction: float | None = None,
    eval_as_original: bool = False,
) -> MoE:
    """Build the MoE layer `name` from `load_fairseq`'s tensors, with copies of its weights in their own dtype.

    The router is GShardRouter(rules="fairseq"); see there for its options, whose defaults are the paper's.
    dropout: the configuration's residual dropout, which fairseq applies inside the expert. Without padding, the
    auxiliary loss is `gshard_load_balance_loss(routing)`. fairseq computes router logits in the model's dtype, here it
    is float32, so in half precision they differ by rounding. Raises ValueError listing every missing, unused and
    misshaped tensor.
    """
    parts = {n.removeprefix(f"{name}."): tensor for n, tensor in tensors.items() if n.startswith(f"{name}.")}
    if _GATE not in parts:
        known = ", ".join(moe_layer_names(tensors)) or "none"
        raise ValueError(
            f"there is no MoE layer {name!r}, since there is no tensor {name}.{_GATE}; the MoE layers are: {known}"
        )
    num_experts, d_model, d_ff, bias = _check_layer(parts, name)
    router = GShardRouter(
        d_model,
        num_experts,
        second_policy=second_policy,
        eval_capacity_fraction=eval_capacity_fraction,
        eval_as_original=eval_as_original,
        device="meta",
    )
    layer = MoE(
        d_model, d_ff, num_experts, activation=activation, bias=bias, dropout=dropout, router=router, device="meta"
    )
    ours = {"router.weight": parts[_GATE].clone()}
    for theirs, own in _TENSORS.items():
        if bias or not own.startswith("b_"):
            ours[f"experts.{own}"] = torch.stack([parts[f"experts.{e}.{theirs}"] for e in range(num_experts)])
    layer.load_state_dict(ours, assign=True)
    return layer


def to_fairseq(layer: MoE, name: str) -> dict[str, Tensor]:
    """Copy the layer's weights under fairseq's names, with experts numbered over the layer: see `expert_tensors`.

    Raises ValueError for another router than GShardRouter(rules="fairseq") and for gated or shared networks. The
    router's other options, activation and dropout are not tensors: they belong in fairseq's configuration.
    """
    router, experts = layer.router, layer.experts
    if not isinstance(router, GShardRouter) or router.rules != "fairseq":
        raise ValueError(f"the router ({router}) must be GShardRouter(rules='fairseq')")
    if experts.w_gate is not None or layer.shared is not None:
        raise ValueError("fairseq's MoE layer has neither gated experts nor a shared network; this layer has")
    tensors = {f"{name}.{_GATE}": router.weight.detach().clone()}
    parameters = dict(experts.named_parameters())
    for e in range(router.num_experts):
        for theirs, own in _TENSORS.items():
            if own in parameters:
                tensors[f"{name}.experts.{e}.{theirs}"] = parameters[own][e].detach().clone()
    return tensors


def _parse(name: str) -> tuple[str, int, str]:
    """Layer, id and the rest of an expert tensor's name."""
    match = _EXPERT.fullmatch(name)
    assert match is not None
    return match["layer"], int(match["id"]), match["name"]


def _expert_names(tensors: Mapping[str, Tensor]) -> dict[str, dict[int, set[str]]]:
    """Layer -> id -> names of the expert's tensors."""
    found: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in filter(_EXPERT.fullmatch, tensors):
        layer, e, rest = _parse(name)
        found[layer][e].add(rest)
    return found


def _find_files(path: Path) -> list[Path]:
    """The files of all ranks, in order."""
    if sharded := sorted(path.parent.glob(f"{_escape(path.name)}-*-shard*.pt")):
        raise ValueError(f"{sharded[0]} is a shard of a parameter-sharded run: merge the shards with fairseq first")
    if not Path(f"{path}-shared.pt").is_file():
        raise ValueError(f"{path}-shared.pt is missing; the prefix of a checkpoint is the path before -shared.pt")
    found: dict[int, Path] = {}
    for file in sorted(path.parent.glob(f"{_escape(path.name)}-rank-*.pt")):
        if match := _RANK_FILE.fullmatch(file.name.removeprefix(path.name)):
            rank = int(match[1])
            if rank in found:
                raise ValueError(f"{found[rank]} and {file} both belong to rank {rank}: remove one")
            found[rank] = file
    missing = sorted(set(range(max(found, default=0) + 1)) - set(found))
    if missing:
        raise ValueError(
            f"the files of some ranks are missing: {', '.join(f'{path}-rank-{rank}.pt' for rank in missing)}"
        )
    return [found[rank] for rank in range(len(found))]


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _read_model(file: Path) -> dict[str, Tensor]:
    """The tensors under "model", in the file's order."""
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{file} is refused: {_why_refused(file, error)}") from error
    except (RuntimeError, EOFError, OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as a file of torch.save: {error!r}") from error
    model = state.get("model") if isinstance(state, dict) else None
    if not isinstance(model, dict):
        raise ValueError(f"{file} must hold a dictionary whose entry 'model' is a dictionary of tensors")
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name!r} under 'model' is a {type(tensor).__name__}, not a tensor with a name")
    return dict(model)


def _why_refused(file: Path, error: Exception) -> str:
    names = sorted(set(_GLOBAL.findall(str(error))))
    if zipfile.is_zipfile(file):  # list all refused names, not only the first
        with torch.serialization.safe_globals(_STAND_INS):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or names
    if not names:
        return " ".join(_REASON.findall(str(error))) or "torch.load refuses it"
    return (
        f"its pickle names {', '.join(names)}, which is neither a tensor nor a plain container. Nothing of it was "
        f"called. Save a copy that holds only {{'model': tensors}} where the file is trusted"
    )


def _count_experts(local: Mapping[str, Tensor], file: Path) -> dict[str, int]:
    """Layer -> number of experts in one rank's file. Raises ValueError for an unknown name and a gap in the ids."""
    if strange := [name for name in local if not _EXPERT.fullmatch(name)]:
        raise ValueError(
            f"{file} holds tensors that belong to no expert: {', '.join(strange)}; they belong in the file -shared.pt"
        )
    counts = {}
    for layer, found in _expert_names(local).items():
        if missing := sorted(set(range(max(found) + 1)) - set(found)):
            raise ValueError(f"{file} lacks {', '.join(f'{layer}.experts.{e}' for e in missing)}")
        counts[layer] = len(found)
    return counts


def _check_experts(tensors: Mapping[str, Tensor], path: Path, num_files: int) -> None:
    """Check that each layer with a gate has exactly the experts 0 to E - 1, all alike, and no other layer has any."""
    found = _expert_names(tensors)
    layers = moe_layer_names(tensors)
    if orphans := [layer for layer in found if layer not in layers]:
        raise ValueError(
            f"{path}: there are experts of {', '.join(orphans)}, but the tensor {orphans[0]}.{_GATE} is missing"
        )
    for layer in layers:
        gate = tensors[f"{layer}.{_GATE}"]
        if gate.dim() != 2:
            raise ValueError(f"{path}: {layer}.{_GATE} {tuple(gate.shape)} must be (E, D)")
        expected = set(range(gate.shape[0]))
        if missing := sorted(expected - set(found[layer])):
            raise ValueError(
                f"{path}: {layer} lacks {_listed(missing)}; the files of {num_files} ranks were read: "
                f"is {path}-rank-{num_files}.pt missing?"
            )
        if extra := sorted(set(found[layer]) - expected):
            raise ValueError(
                f"{path}: the gate of {layer} has {len(expected)} experts, so that {_listed(extra)} must be "
                f"copies: remove the files of replicas"
            )
        names = set.union(*found[layer].values())
        if uneven := [f"{layer}.experts.{e}.{n}" for e in sorted(expected) for n in sorted(names - found[layer][e])]:
            raise ValueError(
                f"{path}: all experts of a layer must have the same tensors; missing: {', '.join(uneven[:20])}"
            )


def _listed(ids: list[int]) -> str:
    shown = ", ".join(f"expert {e}" for e in ids[:8])
    return shown if len(ids) <= 8 else f"{shown} and {len(ids) - 8} more"


def _check_layer(parts: Mapping[str, Tensor], name: str) -> tuple[int, int, int, bool]:
    """E, D, F and whether there are biases. Raises ValueError listing every fault."""
    gate, first = parts[_GATE], parts.get("experts.0.fc1.weight")
    if gate.dim() != 2 or first is None or first.dim() != 2:
        raise ValueError(f"{name}.{_GATE} and {name}.experts.0.fc1.weight must both be there and have two dimensions")
    (num_experts, d_model), d_ff = gate.shape, first.shape[0]
    bias = any(n.endswith((".fc1.bias", ".fc2.bias")) for n in parts)
    shapes = {"fc1.weight": (d_ff, d_model), "fc2.weight": (d_model, d_ff)}
    expected: dict[str, tuple[int, ...]] = {_GATE: (num_experts, d_model)}
    for e in range(num_experts):
        expected |= {f"experts.{e}.{n}": shape for n, shape in shapes.items()}
        expected |= {f"experts.{e}.fc1.bias": (d_ff,), f"experts.{e}.fc2.bias": (d_model,)} if bias else {}
    faults = [f"missing: {name}.{n}" for n in expected if n not in parts]
    faults += [f"unused: {name}.{n}" for n in parts if n not in expected]
    faults += [
        f"misshaped: {name}.{n} {tuple(parts[n].shape)} must be {shape}"
        for n, shape in expected.items()
        if n in parts and tuple(parts[n].shape) != shape
    ]
    faults += [
        f"of another dtype: {name}.{n} {parts[n].dtype}, expert 0 has {first.dtype}"
        for n in expected
        if n in parts and n != _GATE and parts[n].dtype != first.dtype
    ]
    if faults:
        more = f"; and {len(faults) - 20} more" if len(faults) > 20 else ""
        raise ValueError(f"{name} is not a layer of {num_experts} experts: {'; '.join(faults[:20])}{more}")
    return num_experts, d_model, d_ff, bias
