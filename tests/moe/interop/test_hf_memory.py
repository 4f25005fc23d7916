"""A conversion needs the memory of its largest tensor, however large the checkpoint is: it is measured, both ways."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from moe.interop.hf.weights import Weights
from tests.conftest import Command

MEBI = 2**20
SLACK = 8 * MEBI  # of the allocator, and what else the program does meanwhile

PROGRAM = """
import sys, threading, time
from pathlib import Path
from moe.interop.hf import from_hf, to_hf

def anonymous():  # what the process holds beside mapped files, which the kernel takes back when it needs room
    text = open("/proc/self/status").read()
    return 1024 * int(text.split("RssAnon:")[1].split()[0])

def peak_of(work):
    before, peak, done = anonymous(), [0], []
    def watch():
        while not done:
            peak[0] = max(peak[0], anonymous() - before)
            time.sleep(0.0005)
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        work()
    finally:
        done.append(1)
        thread.join()
    return peak[0]

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
from_hf(source.with_name("small"), folder / "warm", without_tokenizer=True)
to_hf(folder / "warm", folder / "warm_back")
print(peak_of(lambda: from_hf(source, folder / "ours", without_tokenizer=True, verify=True)))
print(peak_of(lambda: to_hf(folder / "ours", folder / "back", max_shard_size="20MB", verify=True)))
"""


def write_published(folder: Path, width: int, num_layers: int, num_experts: int) -> tuple[int, int]:
    """A Mixtral of random numbers, without transformers. -> bytes of all tensors, and of the largest."""
    from safetensors.torch import save_file

    tensors = {"model.norm.weight": torch.ones(width)}
    tensors |= {name: torch.zeros(32, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for i in range(num_layers):
        layer = f"model.layers.{i}"
        tensors |= {f"{layer}.{name}.weight": torch.ones(width) for name in ("input_layernorm",
                                                                             "post_attention_layernorm")}  # fmt: skip
        tensors |= {f"{layer}.self_attn.{each}_proj.weight": torch.zeros(width, width) for each in "qkvo"}
        tensors[f"{layer}.block_sparse_moe.gate.weight"] = torch.zeros(num_experts, width)
        for e in range(num_experts):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            tensors |= {f"{expert}.w{n}.weight": torch.full((width, width), float(e)) for n in (1, 2, 3)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "mixtral", "vocab_size": 32, "hidden_size": width, "intermediate_size": width,
        "num_hidden_layers": num_layers, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_local_experts": num_experts, "max_position_embeddings": 64,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    sizes = [tensor.nbytes for tensor in tensors.values()]
    return sum(sizes), max(sizes)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the measure is Linux's /proc/self/status")
def test_memory_is_that_of_the_largest_tensor(tmp_path: Path, command: Command) -> None:
    """32 experts in each of 4 layers: 100 MiB in all, 256 KiB the largest of theirs, 8 MiB of ours."""
    write_published(tmp_path / "small", 8, 1, 2)
    total, largest = write_published(tmp_path / "large", 256, 4, 32)
    assert total > 90 * MEBI
    printed = command("-c", PROGRAM, str(tmp_path / "large"), str(tmp_path / "made")).stdout.split()
    for direction, peak in zip(("in", "out"), map(int, printed), strict=True):
        assert peak < 4 * largest + SLACK, f"{direction}: {peak / MEBI:.1f} MiB of {total / MEBI:.0f}"


def test_one_region_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock or an allocator: no read returns more than one tensor of theirs."""
    from moe.interop.hf import from_hf

    _, largest = write_published(tmp_path / "theirs", 16, 2, 6)
    sizes = []
    read = Weights.read

    def counted(self: Weights, part: object) -> torch.Tensor:
        tensor = read(self, part)
        sizes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Weights, "read", counted)
    from_hf(tmp_path / "theirs", tmp_path / "ours", without_tokenizer=True)
    assert max(sizes) == largest
    assert len(sizes) == 2 * (6 + 1 + 3 * 6) + 3  # each of theirs once
