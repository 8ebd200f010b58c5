"""`coldmerge demo`: the whole loop on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coldmerge.cli.output import Format, FormatOption, err, out, print_json

if TYPE_CHECKING:
    from coldmerge.demo.result import DemoResult


def register(app: typer.Typer) -> None:
    """Add this verb to the root command."""
    app.command(epilog="Example: coldmerge demo --data ./sets --rounds 3 --keep ./kept")(demo)


def _names(value: str | None) -> tuple[str, ...] | None:
    return tuple(name for name in value.split(",") if name) if value is not None else None


def demo(
    rounds: Annotated[int, typer.Option(help="How many rounds.")] = 4,
    seed: Annotated[int, typer.Option(help="Decides splits, draws and training.")] = 0,
    seeds: Annotated[int, typer.Option(help="Run everything this often, with seed, seed+1, …")] = 1,
    seen: Annotated[
        str | None, typer.Option(help="Tasks trained on, one organization each: a,b,c.")
    ] = None,
    unseen: Annotated[str | None, typer.Option(help="Tasks that only measure: d,e.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folders of train/validation/test.jsonl, instead of documentation."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A Hugging Face folder, instead of all-MiniLM-L6-v2.")
    ] = None,
    keep: Annotated[Path | None, typer.Option(help="Leave everything in this new folder.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Digits and a small network.")] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Start a coordinator and several organizations here, improve a real model, measure it."""
    from coldmerge.demo.plan import Options
    from coldmerge.demo.run import run

    options = Options(
        rounds=rounds,
        seed=seed,
        seeds=seeds,
        seen=_names(seen),
        unseen=_names(unseen),
        data=data,
        model=model,
        keep=keep,
        tiny=tiny,
    )
    result = run(options, lambda text: err.print(text, highlight=False))
    if fmt is Format.JSON:
        print_json(result.as_json())
        return
    _show(result)


def _show(result: DemoResult) -> None:
    from rich.table import Table

    from coldmerge.demo.table import COLUMNS, NUMERIC, rows, summary

    table = Table(box=None, header_style="bold", pad_edge=False)
    for place, name in enumerate(COLUMNS):
        table.add_column(name, justify="right" if place in NUMERIC else "left")
    for row in rows(result):
        table.add_row(*row)
    out.print(table)
    for sentence in summary(result):
        out.print(sentence, highlight=False)
    out.print(f"Took {result.seconds:.0f} s. Report: {result.report}", highlight=False)
    out.print(f"Next: {result.next_command}", highlight=False)
