"""What leaves with a contribution, on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

from coldmerge.cli.output import Format, err, out, print_json, size

if TYPE_CHECKING:
    from coldmerge_client.prepare import Leaving

_MADE_OF = {
    "fisher": "fisher, how much each weight matters to {:g} of your examples",
    "gram": "gram, which activations go together over {:g} tokens of your examples",
    "trim": "trim, the threshold of each tensor at density {:g}: it follows from the tensors",
}
_CONSENTS = {
    "leave_one_out": "a bad candidate may be tried without this alone",
    "learn_coefficients": "this may get a coefficient of its own, learned with several candidates",
}


def ask_whether(leaving: Leaving) -> bool:
    """Show what would leave, and ask a person whether it may."""
    print_leaving(leaving, Format.TABLE, sent=False)
    return typer.confirm("May this leave?", default=False, err=True)


def print_leaving(leaving: Leaving, fmt: Format, *, sent: bool) -> None:
    """Print exactly what has left with a contribution, or would leave."""
    numbers = ", ".join(f"{key} {value:g}" for key, value in leaving.numbers.items())
    if fmt is Format.JSON:
        print_json(
            {
                "sent": sent,
                "model": leaving.model,
                "base": leaving.base_number,
                "kind": leaving.kind,
                "encoding": leaving.encoding,
                "bytes": leaving.payload_bytes,
                "norm": leaving.norm,
                "tensors": dict(leaving.tensors),
                "numbers": dict(leaving.numbers),
                "statistics": dict(leaving.statistics),
                "consents": list(leaving.consents),
                "kept_home": dict(leaving.kept_home),
                "unchanged": leaving.unchanged,
            }
        )
        return
    word = "Left" if sent else "Would leave"
    if leaving.kind == "evaluation":
        out.print(f"[bold]{word}:[/bold] these numbers and nothing else: {numbers}")
        return
    out.print(
        f"[bold]{word}:[/bold] {len(leaving.tensors)} tensors, {size(leaving.payload_bytes)} in "
        f"{leaving.encoding}, norm {leaving.norm:.4g}, against release {leaving.base_number} "
        f"of {leaving.model}. Nothing else.",
        highlight=False,
    )
    if not sent:
        for name, nbytes in leaving.tensors:
            out.print(f"  {name}  {size(nbytes)}", highlight=False)
    out.print(f"[bold]Numbers:[/bold] {numbers}", highlight=False)
    for kind, value in sorted(leaving.statistics.items()):
        out.print(f"[bold]Statistic:[/bold] {_MADE_OF[kind].format(value)}", highlight=False)
    for consent in leaving.consents:
        out.print(f"[bold]Consent:[/bold] {_CONSENTS[consent]}")
    for name, reason in leaving.kept_home:
        out.print(f"[bold]Stays home:[/bold] {name} ({reason})", highlight=False)
    out.print(f"[bold]Unchanged:[/bold] {leaving.unchanged} tensors", highlight=False)


def print_stale(sentence: str | None) -> None:
    """Print what a stale fine-tune counts for, if it is stale."""
    if sentence is not None:
        err.print(f"[yellow]note:[/yellow] {sentence}.", highlight=False)
