"""`coldmerge release`: what was published, and going back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from coldmerge.cli.local import DEFAULT_DIR, PANEL, DirOption, ask, coordinator_folder, local
from coldmerge.cli.output import Format, FormatOption, bars, out, print_record, print_rows
from coldmerge.core.errors import IntegrityError

group = typer.Typer(
    help="List, export, verify and roll back releases.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.add_typer(group, name="release", rich_help_panel=PANEL)


def release_row(message: Any) -> dict[str, object]:
    """A Release message as the columns that tables and JSON show."""
    from coldmerge.core.documents import ReleaseRecord

    record = ReleaseRecord.parse(message.record.document)
    return {
        "number": record.number,
        "digest": record.content_digest,
        "round": record.round,
        "contributions": len(record.contributions),
        "flags": list(record.flags),
        "published_at": message.published_at.ToJsonString(),
    }


@group.command("list", epilog="Example: coldmerge release list triage --dir ./hub")
def list_releases(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """List a model's releases, oldest first."""
    from coldmerge.wire.v1 import models_pb2

    with local(folder) as coordinator:
        found = ask(coordinator.models.ListReleases, models_pb2.ListReleasesRequest(model=model))
    print_rows([release_row(message) for message in found.releases], fmt, empty="No release yet.")


@group.command(epilog="Example: coldmerge release show triage 3 --dir ./hub --format json")
def show(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    number: Annotated[int, typer.Argument(min=0, help="Number of the release.")],
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Show a release's signed record: lineage, recipe, contributions, digests."""
    from coldmerge.core.documents import ReleaseRecord
    from coldmerge.wire.v1 import models_pb2

    with local(folder) as coordinator:
        message = ask(
            coordinator.models.GetRelease,
            models_pb2.GetReleaseRequest(model=model, number=number),
        )
    record = ReleaseRecord.parse(message.record.document)
    fields = record.model_dump(mode="json")
    fields["record_digest"] = record.digest()
    fields["tensors"] = len(message.tensors)
    fields["bytes"] = sum(tensor.nbytes for tensor in message.tensors)
    print_record(fields, fmt)


@group.command(epilog="Example: coldmerge release export triage 3 ./triage-3 --dir ./hub")
def export(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    number: Annotated[int, typer.Argument(min=0, help="Number of the release.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A folder to create.")],
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Write a release as a Hugging Face folder: weights, tokenizer, model card, record."""
    from coldmerge_coordinator.exporting import export as write
    from coldmerge_coordinator.store import Store

    store = Store.open(coordinator_folder(folder))
    with bars(fmt) as progress:
        made = write(store, model, number, target, progress=progress)
    print_record(
        {
            "model": model,
            "release": made.number,
            "digest": made.digest,
            "folder": str(target),
            "bytes": made.nbytes,
        },
        fmt,
    )
    if fmt is Format.TABLE:
        out.print(f'Load it: AutoModel.from_pretrained("{target}")', highlight=False)


@group.command(epilog="Example: coldmerge release rollback triage 2 --reason 'bad labels in 3'")
def rollback(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    number: Annotated[int, typer.Argument(min=0, help="The release to return to.")],
    reason: Annotated[str, typer.Option(help="Why; goes into the new release's record.")] = "",
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Publish an old release again, under the next number."""
    from coldmerge.wire.v1 import admin_pb2

    with local(folder) as coordinator:
        message = ask(
            coordinator.admin.Rollback,
            admin_pb2.RollbackRequest(model=model, number=number, reason=reason),
        )
    print_record(release_row(message), fmt)


@group.command(epilog="Example: coldmerge release verify triage 3 --dir ./hub --format json")
def verify(
    model: Annotated[str, typer.Argument(help="Name of the model.")],
    number: Annotated[
        int | None, typer.Argument(min=0, help="Number of the release. Default: the latest.")
    ] = None,
    folder: DirOption = DEFAULT_DIR,
    scratch: Annotated[
        Path | None, typer.Option(help="Where to merge. Default: the system's temporary folder.")
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Check a release's signatures and bytes, and merge its contributions again.

    Answers exact, within-tolerance, inputs-erased or different. Exits 10 if different.
    """
    import tempfile

    from coldmerge_coordinator.store import Store
    from coldmerge_coordinator.verifying import verify_release

    place = scratch or Path(tempfile.gettempdir())
    with Store.open(coordinator_folder(folder)) as store, bars(fmt) as progress:
        found = verify_release(store, model, number, place, progress=progress)
    print_record(
        {
            "model": found.model,
            "release": found.number,
            "answer": found.answer,
            "merged": found.merged,
            "signatures": f"{found.signatures[0]} of {found.signatures[1]}",
            "largest_difference": found.largest,
            "erased": found.erased,
            "problems": found.problems,
            "note": found.note,
        },
        fmt,
    )
    if found.answer == "different":
        raise typer.Exit(IntegrityError.exit_status)
