"""`coldmerge extract`: what a fine-tune changed, as a task vector or a LoRA adapter."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from coldmerge.cli.output import (
    Format,
    FormatOption,
    bars,
    out,
    print_json,
    print_record,
    print_rows,
    size,
)
from coldmerge.cli.weights import PANEL, BaseArgument
from coldmerge.core.errors import ConfigError, NotFoundError

if TYPE_CHECKING:
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.extraction import Extraction
    from coldmerge.core.low_rank import Choice, LowRank
    from coldmerge.core.progress import Progress


class Encoding(StrEnum):
    """How the numbers of a task vector or adapter are stored."""

    FP32 = "fp32"
    BF16 = "bf16"


def register(app: typer.Typer) -> None:
    """Add this verb to the root command."""
    example = "coldmerge extract ./bert ./bert-tuned ./adapter --rank 16"
    app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(extract)


def extract(
    base: BaseArgument,
    tuned: Annotated[
        Path, typer.Argument(help="What was trained from it: a model folder or PEFT adapter.")
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", help="A task vector file; with --rank a folder.")
    ],
    encoding: Annotated[
        Encoding, typer.Option(help="`bf16` takes half the bytes and keeps 8 bits of precision.")
    ] = Encoding.FP32,
    private: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN", help="Tensors to leave out, such as 'classifier.*'. Repeatable."
        ),
    ] = None,
    trim: Annotated[
        float | None,
        typer.Option(metavar="DENSITY", help="Add each tensor's trim threshold at this density."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Make a PEFT LoRA adapter of this rank instead.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="The adapter's alpha. Default: the rank.")
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Modules to adapt, such as '*_proj'. Repeatable. Default: all.",
        ),
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Write what TUNED changed against BASE: a task vector, or with --rank a LoRA adapter."""
    from coldmerge.core.adapter_writer import check_free
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.low_rank import Choice

    _check_options(trim, rank, alpha, targets)
    kept_back = tuple(private or ())
    choice = None
    if rank is not None:
        choice = Choice(
            rank, float(rank) if alpha is None else alpha, tuple(targets or ()), kept_back
        )
    check_free(target)
    opened = Checkpoint.open(base)
    _check_there(tuned)
    if choice is None:
        with bars(fmt) as progress:
            full = _extract_full(opened, tuned, target, encoding, kept_back, trim, progress)
        _show_full(full, fmt)
        return
    with bars(fmt) as progress:
        found = _extract_low_rank(opened, tuned, target, encoding, choice, progress)
    _show_low_rank(found, target, choice, fmt)


def _check_options(
    trim: float | None, rank: int | None, alpha: float | None, targets: list[str] | None
) -> None:
    if trim is not None and not 0 < trim <= 1:
        raise ConfigError(
            "extract.bad_density",
            "A density of --trim is a share of the elements.",
            expected="above 0, at most 1",
            got=f"{trim:g}",
            hint="Give the density that the round or plan merges with, such as 0.2.",
        )
    wrong = ["--trim"] if rank is not None and trim is not None else []
    if rank is None:
        wrong = ["--alpha"] * (alpha is not None) + ["--targets"] * bool(targets)
    if wrong:
        raise ConfigError(
            "extract.wrong_option",
            f"{wrong[0]} does not go with {'a task vector' if rank is None else '--rank'}.",
            expected="--trim for a task vector; --alpha and --targets for an adapter",
            hint="Add --rank 16 for an adapter." if rank is None else "Leave --trim out.",
        )


def _check_there(tuned: Path) -> None:
    if not tuned.exists():
        raise NotFoundError(
            "weights.not_found",
            f"There is nothing at {tuned}.",
            expected="the folder of a fine-tuned model",
            hint="Check the path.",
        )


def _extract_full(
    base: Checkpoint,
    tuned: Path,
    target: Path,
    encoding: str,
    private: tuple[str, ...],
    trim: float | None,
    progress: Progress,
) -> Extraction:
    from coldmerge.core.digests import digest_of
    from coldmerge.core.extraction import extract as write
    from coldmerge.core.progress import Counter
    from coldmerge.core.statistics import Wanted

    digest = digest_of(base, progress)
    elements = sum(spec.size for spec in base.tensors.values())
    return write(
        base,
        tuned,
        target,
        base_digest=digest,
        private=private,
        encoding=encoding,
        statistics=Wanted(density=trim),
        progress=Counter("extract", elements, progress).add,
    )


def _show_full(found: Extraction, fmt: Format) -> None:
    vector = found.task_vector
    record: dict[str, object] = {
        "task_vector": str(vector.path),
        "kind": vector.kind,
        "encoding": vector.encoding,
        "statistics": dict(vector.statistics),
        "base_digest": vector.base_digest,
        "tensors": len(vector.names),
        "bytes": vector.payload_bytes,
        "norm": found.norm,
    }
    if fmt is Format.JSON:
        kept = [{"tensor": name, "reason": reason} for name, reason in found.kept_home]
        lists = {"unchanged": list(found.unchanged), "missing": list(found.missing)}
        print_json({**record, "left_out": kept, **lists})
        return
    if found.kept_home:
        rows = [{"left_out": name, "reason": reason} for name, reason in found.kept_home]
        print_rows(rows, fmt, empty="")
        out.print()
    record["bytes"] = size(vector.payload_bytes)
    record["statistics"] = [f"{kind} {value:g}" for kind, value in vector.statistics.items()]
    record |= {"unchanged": len(found.unchanged), "not_in_the_fine_tune": list(found.missing)}
    print_record(record, fmt)


def _extract_low_rank(
    base: Checkpoint,
    tuned: Path,
    target: Path,
    encoding: str,
    choice: Choice,
    progress: Progress,
) -> LowRank:
    from coldmerge.core.adapter_writer import write_adapter
    from coldmerge.core.deltas import open_delta
    from coldmerge.core.digests import digest_of
    from coldmerge.core.low_rank import factorize
    from coldmerge.core.progress import Counter

    delta = open_delta(base, tuned, digest_of(base, progress))
    elements = sum(base.tensors[name].size for name in delta.names)
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{target.name}.partial-", dir=target.parent) as scratch:
        found = factorize(
            base,
            delta,
            Path(scratch) / "factors.safetensors",
            choice,
            label=str(tuned),
            encoding=encoding,
            progress=Counter("factorize", elements, progress).add,
        )
        write_adapter(found.vector, base, target, choice.rank, choice.alpha)
    return found


def _show_low_rank(found: LowRank, target: Path, choice: Choice, fmt: Format) -> None:
    tensors = [
        {"tensor": o.name, "rank": o.rank, "norm": o.norm, "relative_error": o.relative_error}
        for o in found.factored
    ]
    left = [
        {"left_out": o.name, "reason": o.reason, "norm": o.norm, "share": found.share(o)}
        for o in found.left_out
    ]
    clipped = [one.name for one in found.factored if one.rank < choice.rank]
    record: dict[str, object] = {
        "adapter": str(target),
        "rank": choice.rank,
        "alpha": choice.alpha,
        "encoding": found.vector.encoding,
        "tensors": len(tensors),
        "rank_clipped": clipped,
        "relative_error": found.relative_error,
        "relative_error_with_left_out": found.relative_error_with_left_out,
        "share_left_out": sum(found.share(one) for one in found.left_out),
    }
    if fmt is Format.JSON:
        unchanged = list(found.unchanged)
        print_json({**record, "matrices": tensors, "left_out": left, "unchanged": unchanged})
        return
    for rows in (tensors, left):
        if rows:
            print_rows(rows, fmt, empty="")
            out.print()
    print_record(record, fmt)
