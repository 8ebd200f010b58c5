"""`coldmerge model`: what the federation improves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coldmerge.cli.local import DEFAULT_DIR, PANEL, DirOption, ask, coordinator_folder, local
from coldmerge.cli.output import Format, FormatOption, bars, err, out, print_record, print_rows
from coldmerge.cli.rounds import note_small_cohort

group = typer.Typer(help="Add and list models.", no_args_is_help=True, rich_markup_mode="markdown")


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    app.add_typer(group, name="model", rich_help_panel=PANEL)


@group.command(
    epilog="Example: coldmerge model add triage --from ./bert --private 'classifier.*' --dir ./hub"
)
def add(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    source: Annotated[Path, typer.Option("--from", help="A Hugging Face folder with safetensors.")],
    private: Annotated[
        list[str] | None,
        typer.Option(help="Tensors that never leave a contributor, such as 'classifier.*'."),
    ] = None,
    template: Annotated[
        Path | None, typer.Option(help="A round template in YAML, for the rounds that improve it.")
    ] = None,
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Import a pretrained model as release 0. The coordinator may be running."""
    from coldmerge.rounds.policy import RoundTemplate, load_yaml
    from coldmerge_coordinator.importing import add_model
    from coldmerge_coordinator.store import Store

    rules = load_yaml(template) if template else RoundTemplate()
    store = Store.open(coordinator_folder(folder))
    with bars(fmt) as progress:
        made = add_model(store, name, source, tuple(private or ()), rules, progress=progress)
    for note in made.notes:
        err.print(f"[yellow]note:[/yellow] {note}", highlight=False)
    if fmt is Format.TABLE and rules.continuous is not None:
        note_small_cohort(rules.min_contributions)
    print_record(
        {
            "model": name,
            "release": 0,
            "digest": made.digest,
            "tensors": made.tensors,
            "shared_tensors": made.shared,
            "bytes": made.nbytes,
        },
        fmt,
    )
    if fmt is Format.TABLE:
        out.print(f"Next: coldmerge invite ORG --dir {folder}", highlight=False)


@group.command(
    "template", epilog="Example: coldmerge model template triage rounds.yaml --dir ./hub"
)
def set_template(
    name: Annotated[str, typer.Argument(help="Name of the model.")],
    file: Annotated[Path, typer.Argument(help="A round template in YAML.")],
    folder: DirOption = DEFAULT_DIR,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Replace the rules the model's next rounds open with, its schedule included."""
    from coldmerge.rounds.policy import load_yaml
    from coldmerge_coordinator.importing import set_template as replace
    from coldmerge_coordinator.store import Store

    template = load_yaml(file)
    for note in replace(Store.open(coordinator_folder(folder)), name, template):
        err.print(f"[yellow]note:[/yellow] {note}", highlight=False)
    if fmt is Format.TABLE and template.continuous is not None:
        note_small_cohort(template.min_contributions)
    print_record({"model": name, **template.to_json()}, fmt)


@group.command("list", epilog="Example: coldmerge model list --dir ./hub --format json")
def list_models(folder: DirOption = DEFAULT_DIR, fmt: FormatOption = Format.TABLE) -> None:
    """List models with their latest release."""
    from coldmerge.wire.v1 import models_pb2

    with local(folder) as coordinator:
        found = ask(coordinator.models.ListModels, models_pb2.ListModelsRequest())
    rows = [
        {
            "model": model.name,
            "release": model.latest_number,
            "digest": model.latest_digest,
            "private": list(model.private_patterns),
        }
        for model in found.models
    ]
    print_rows(rows, fmt, empty="No model yet. Next: coldmerge model add NAME --from HF_FOLDER")
