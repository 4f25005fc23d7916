"""`moe convert`: weights from one format to another. `from-hf` and `to-hf` are subcommands of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from moe.cli.overrides import Overrides

_OURS = "checkpoint"  # the command that `moe convert SRC DST` means


class _OursByDefault(TyperGroup):
    """A group whose command may be left out: a first argument that names none is an argument of `checkpoint`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Like click's, but inserts the command if it is missing."""
        if args and args[0] not in (*self.commands, "-h", "--help"):
            args = [_OURS, *args]
        return super().parse_args(ctx, args)


convert = typer.Typer(
    cls=_OursByDefault,
    no_args_is_help=True,
    help="Convert weights. `moe convert SRC DST` is short for `moe convert checkpoint SRC DST`.",
)


@convert.command(_OURS)
def checkpoint(
    source: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    upcycle: Annotated[str | None, typer.Option(help="Give a dense model experts: a preset of configs/moe.")] = None,
    granularity: Annotated[
        int, typer.Option(help="With --upcycle: slices that each dense network is cut into.", min=1)
    ] = 1,
    seed: Annotated[int, typer.Option(help="With --upcycle: seed of the routers.", min=0)] = 0,
    overrides: Overrides = None,
) -> None:
    """Merge the weights of a checkpoint, of any number of ranks, into one model.safetensors.

    With `--upcycle 8e`: turn a dense model into a sparse one that computes the same function. Overrides change the
    preset: `moe convert runs/dense runs/sparse --upcycle 8e model.moe.top_k=4`. The command that continues training
    from the result is printed to stderr.
    """
    if upcycle is None:
        if overrides or granularity != 1 or seed != 0:
            raise ValueError("overrides, --granularity and --seed apply only with --upcycle PRESET: leave them out")
        from moe.checkpoint import consolidate

        typer.echo(consolidate(source, destination))
        return
    from moe.checkpoint import load_config
    from moe.compose import compose
    from moe.upcycling import train_command, upcycle_checkpoint

    others = [each for each in overrides or [] if not each.lstrip("+").startswith("model.moe.")]
    if others:
        raise ValueError(
            f"{others[0]} cannot be set with --upcycle, which takes everything but the experts from {source}: set "
            f"only model.moe.*, and other values in the run that continues training"
        )
    depth = f"model.num_layers={load_config(source).model.num_layers}"  # the placement of experts must fit this model
    moe = compose([f"+moe={upcycle}", depth, *(overrides or [])]).model.moe
    assert moe is not None
    made = upcycle_checkpoint(source, destination, moe, granularity=granularity, seed=seed)
    typer.echo(made)
    typer.echo(f"to continue training: {train_command(made, upcycle)}", err=True)


@convert.command("from-hf")
def import_published(
    source: Annotated[Path, typer.Argument(help="Folder with config.json and weights, as on the Hub.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64. Default: as stored.")
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Read both again and compare every tensor.")] = False,
    without_tokenizer: Annotated[bool, typer.Option("--without-tokenizer", help="Convert the weights only.")] = False,
) -> None:
    """Import a published checkpoint: OPT, XGLM, GPT-2, Llama, Mixtral, OLMoE, Qwen3-MoE, dots.llm1."""
    from moe.interop.hf import from_hf

    made = from_hf(source, destination, dtype=dtype, verify=verify, without_tokenizer=without_tokenizer)
    typer.echo(made)


@convert.command("to-hf")
def export_published(
    source: Annotated[Path, typer.Argument(help="Run folder or checkpoint.")],
    destination: Annotated[Path, typer.Argument(help="Folder to create.")],
    family: Annotated[
        str | None,
        typer.Option(help="opt, xglm, gpt2, llama, mixtral, olmoe, qwen3_moe or dots1. Default: the first that fits."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, float16 or float64. Default: as stored.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a file, such as 5GB, 500MB or 1GiB.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="Read both again and compare every tensor.")] = False,
) -> None:
    """Export a checkpoint to a folder that transformers.AutoModelForCausalLM opens without any of our code."""
    from moe.interop.hf import to_hf

    typer.echo(to_hf(source, destination, family=family, dtype=dtype, max_shard_size=max_shard_size, verify=verify))
