"""`moe kernels`: what every Triton kernel costs, on GPUs that need not be present."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def kernels(
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100 or gfx942; repeat for several. Default: all.")
    ] = None,
    one_each: Annotated[
        bool, typer.Option("--one-each", help="Compile one configuration of each kernel instead of all.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="File for the table: .csv or .json; .md with --roofline.")] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Show what limits each kernel, from data sheets; compiles nothing.")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Measure tile sizes of the grouped GEMM on this GPU.")] = False,
) -> None:
    """Compile every Triton kernel for several GPUs, none of which need be present, and print what each kernel costs.

    Fails if a kernel does not compile or spills registers.
    """
    if tune:
        from moe.kernel_table import print_winners

        print_winners()
        return
    if roofline:
        from moe.kernels.roofline import DEVICES, page, write_page

        if one_each:
            raise ValueError("--roofline compiles nothing, so --one-each has no meaning beside it: leave one out")
        text = page(tuple(target or DEVICES))
        typer.echo(text)
        if out is not None:
            write_page(text, out)
        return
    from moe.kernels.aot import TARGETS, compile_all

    as_csv = out is not None and out.suffix == ".csv"
    rows = compile_all(targets=tuple(target or TARGETS), one_each=one_each, out=None if as_csv else out)
    from moe.kernel_table import print_table, write_csv

    print_table(rows)
    if as_csv and out is not None:
        write_csv(rows, out)
    broken = [row for row in rows if row.error is not None or row.spill_instructions > 0]
    if broken:
        typer.echo(
            f"error: {len(broken)} of {len(rows)} kernels do not compile or spill: "
            + ", ".join(f"{row.kernel} ({row.configuration}, {row.target})" for row in broken),
            err=True,
        )
        raise typer.Exit(1)
