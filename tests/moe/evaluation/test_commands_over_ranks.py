"""`moe perplexity` and `moe translate` in two processes write what one process writes, to the bit."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import moe.distributed.world as world_module
from moe.checkpoint import TrainState, save_checkpoint
from moe.cli import app
from moe.compose import to_yaml
from moe.config import RunConfig
from moe.data.tokenizer import Tokenizer
from moe.evaluation import text_perplexity, translation
from moe.model import Transformer

pytest.importorskip("sacrebleu", reason="moe translate scores by it (extra `eval`)")

RANKS = 2
BATCH_TOKENS = 120  # so that there are several batches to share
WORDS = ["the cat", "a dog ran", "on the mat", "the red log sat", "a mat"]


def write_inputs(folder: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """A model of no training, ten documents, and five lines in two languages."""
    config.model.vocab_size, config.model.max_seq_len = tokenizer.vocab_size, 48
    model = Transformer(config.model)
    model.reset_parameters(seed=2)
    with torch.no_grad():
        model.embedding.weight.mul_(20)  # logits far from flat: other batches would be other texts
    save_checkpoint(
        folder / "run",
        model=model,
        optimizer=None,
        state=TrainState(step=1),
        config_yaml=to_yaml(config),
        tokenizer=tokenizer,
        keep_last=1,
    )
    (folder / "news").mkdir()
    for number in range(10):
        (folder / "news" / f"{number}.txt").write_text(f"{WORDS[number % 5]} " * (3 * number + 1))
    (folder / "lines").mkdir()
    for code, order in (("en", 1), ("fr", -1)):
        (folder / "lines" / f"{code}.txt").write_text("".join(f"{line}\n" for line in (WORDS * 4)[::order]))


def commands(folder: Path, out: Path) -> list[list[str]]:
    run, news, lines = (str(folder / name) for name in ("run", "news", "lines"))
    return [
        ["perplexity", run, news, "--protocol", "rolling", "--device", "cpu", "--out", str(out / "perplexity")],
        [
            *("translate", run, lines, "--languages", "en,fr", "--shots", "1", "--tokens", "6"),
            *("--demo-lines", "5", "--device", "cpu", "--out", str(out / "translation")),
        ],
    ]


def rank_program(rank: int, folder: Path, ports: list[int]) -> None:
    torch.set_num_threads(1)
    end, world_module.end_process = world_module.end_process, lambda status=0: None
    write, counts = translation._write, [0]

    def counted(model: Any, tokenizer: Any, prompts: list[list[int]], *others: Any) -> Any:
        counts[0] += len(prompts)
        return write(model, tokenizer, prompts, *others)

    translation._write = counted
    for function in (text_perplexity.score_domain, translation.translate):
        function.__kwdefaults__["batch_tokens"] = BATCH_TOKENS
    with (folder / f"printed{rank}").open("w") as file, contextlib.redirect_stdout(file):
        for command, port in zip(commands(folder, folder / "together"), ports, strict=True):
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            app(command, standalone_mode=False)
    (folder / f"lines{rank}").write_text(str(counts[0]))
    end()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


class Reached(Exception):
    """What a command was about to do, in place of doing it."""


def test_every_command_ends_texts_where_the_checkpoint_says(
    tmp_path: Path, config: RunConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="moe eval runs lm-eval's tasks (extra `eval`)")
    pytest.importorskip("rouge_score", reason="moe instruct eval scores by it (extra `eval`)")
    write_inputs(tmp_path, config, tokenizer)
    run, data = str(tmp_path / "run"), str(tmp_path)
    (checkpoint,) = (tmp_path / "run").glob("step_*")
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [7, 5]}')

    def reach(*arguments: Any, end_ids: object = None, **_: Any) -> None:
        raise Reached(next((each.end_ids for each in arguments if hasattr(each, "end_ids")), end_ids))

    monkeypatch.setattr("moe.evaluation.translation.translate", reach)
    monkeypatch.setattr("moe.evaluation.lm_eval_run.run_lm_eval", reach)
    monkeypatch.setattr("moe.evaluation.protocol_run.run_protocol", reach)
    monkeypatch.setattr("moe.instruct.evaluation.command.evaluate_tasks", reach)
    monkeypatch.setattr("moe.instruct.evaluation.command.read_tasks", lambda *_: ([], {}))
    for command in (
        commands(tmp_path, tmp_path)[1][:-2],
        ["eval", run, "--tasks", "copa", "--data-dir", data],
        ["eval", run, "--tasks", "copa", "--data-dir", data, "--protocol", "xglm"],
        ["instruct", "eval", run, data],
    ):
        with pytest.raises(Reached) as reached:
            app([*command, "--out", str(tmp_path / "out")], standalone_mode=False)
        assert reached.value.args == ((tokenizer.eos_id, 5, 7),), command


def test_results_are_not_written_over(tmp_path: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """By neither command, and before the model is loaded."""
    write_inputs(tmp_path, config, tokenizer)
    for command in commands(tmp_path, tmp_path / "out"):
        app(command, standalone_mode=False)
        out = Path(command[-1])
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        command[1] = str(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=f"{out} holds the results of .*; choose another --out"):
            app(command, standalone_mode=False)
        assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_two_processes_write_what_one_writes(
    tmp_path: Path, config: RunConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for function in (text_perplexity.score_domain, translation.translate):
        monkeypatch.setitem(function.__kwdefaults__, "batch_tokens", BATCH_TOKENS)
    write_inputs(tmp_path, config, tokenizer)
    for command in commands(tmp_path, tmp_path / "alone"):
        app(command, standalone_mode=False)
    mp.spawn(rank_program, (tmp_path, [free_port(), free_port()]), nprocs=RANKS)
    alone = {path.relative_to(tmp_path / "alone"): path for path in (tmp_path / "alone").rglob("*") if path.is_file()}
    together = {
        path.relative_to(tmp_path / "together") for path in (tmp_path / "together").rglob("*") if path.is_file()
    }
    assert {path.name for path in alone} >= {"results.json", "table.md", "plot.png", "en-fr.txt", "matrix.png"}
    assert alone.keys() == together
    for name, path in alone.items():
        assert path.read_bytes() == (tmp_path / "together" / name).read_bytes(), name
    shares = [int((tmp_path / f"lines{rank}").read_text()) for rank in range(RANKS)]
    assert min(shares) > 5 and sum(shares) == 2 * 15  # of both directions: no line was written twice
    assert "en -> fr" in (tmp_path / "printed0").read_text()
    assert (tmp_path / "printed1").read_text() == ""
