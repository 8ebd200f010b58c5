"""`coldmerge diff`, `similarity`: how far models moved, and how alike their moves are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coldmerge.cli.output import (
    Format,
    FormatOption,
    bars,
    out,
    print_json,
    print_record,
    print_rows,
)
from coldmerge.core.errors import ConfigError

if TYPE_CHECKING:
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.comparison import Change, Mismatch, Sides
    from coldmerge.core.progress import Progress
    from coldmerge.core.similarity import Similarity, Sums
    from coldmerge.report.heatmap import Heatmap

PANEL = "Merging"
PICTURES = (".html", ".png", ".svg")
BaseArgument = Annotated[Path, typer.Argument(metavar="BASE", help="The base: a model folder.")]


def register(app: typer.Typer) -> None:
    """Add these verbs to the root command."""
    verbs: dict[Callable[..., None], str] = {
        diff: "coldmerge diff ./bert ./bert-tuned --top 20",
        similarity: "coldmerge similarity ./bert ./law ./medicine ./lora --picture cosines.png",
    }
    for verb, example in verbs.items():
        app.command(epilog=f"Example: {example}", rich_help_panel=PANEL)(verb)


def diff(
    a: Annotated[Path, typer.Argument(help="A model folder.")],
    b: Annotated[
        Path, typer.Argument(help="A model folder; or a task vector or PEFT adapter of A.")
    ],
    top: Annotated[
        int | None, typer.Option(min=1, help="Only the tensors that changed most, most first.")
    ] = None,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Say how far B is from A: norms, changed elements, by tensor, by layer and in all."""
    from coldmerge.core.checkpoint import Checkpoint

    base = Checkpoint.open(a)
    with bars(fmt) as progress:
        tensors, sides, buffers = _compare(base, b, progress)
    answer = _diff_json(tensors, top) | {
        "a": str(a),
        "b": str(b),
        "buffers_changed": buffers,
        "only_in_a": list(sides.only_in_a) if sides else [],
        "only_in_b": list(sides.only_in_b) if sides else [],
        "shapes_differ": _mismatches(sides.shapes if sides else ()),
        "types_differ": _mismatches(sides.types if sides else ()),
    }
    if fmt is Format.JSON:
        print_json(answer)
    else:
        _show_diff(answer)


def _compare(
    base: Checkpoint, path: Path, progress: Progress
) -> tuple[dict[str, Change], Sides | None, list[str]]:
    """Changes by tensor; for two folders how they were matched, and the buffers that differ."""
    from coldmerge.core import comparison
    from coldmerge.core.adapters import is_adapter
    from coldmerge.core.algebra import Delta
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.deltas import open_delta
    from coldmerge.core.digests import digest_of
    from coldmerge.core.dtypes import FLOATS
    from coldmerge.core.progress import Counter

    sides, buffers = None, []
    if path.is_dir() and not is_adapter(path):
        model = Checkpoint.open(path)
        sides = comparison.match_sides(base, model)
        delta: Delta = sides.delta
        names = delta.names
        found = comparison.buffer_changes(base, model, sides.buffers)
        buffers = [name for name, change in found.items() if change.changed]
    else:
        delta = open_delta(base, path, digest_of(base, progress) if path.is_file() else "")
        names = frozenset(n for n, spec in base.tensors.items() if spec.dtype in FLOATS)
    counter = Counter("compare", sum(base.tensors[n].nbytes for n in names), progress)
    return comparison.changes(base, delta, names, str(path), counter.add), sides, buffers


def _diff_json(tensors: dict[str, Change], top: int | None) -> dict[str, Any]:
    from coldmerge.core import comparison

    shown = tensors
    if top is not None:
        shown = dict(sorted(tensors.items(), key=lambda item: (-item[1].norm, item[0]))[:top])
    layers = comparison.by_layer(tensors)
    total = sum(tensors.values(), comparison.Change())
    return {
        "tensors": [{"tensor": name, **_change(change)} for name, change in shown.items()],
        "layers": [{"layer": layer, **_change(change)} for layer, change in layers.items()],
        "total": {"tensors": len(tensors), **_change(total)},
    }


def _change(change: Change) -> dict[str, object]:
    return {
        "elements": change.elements,
        "norm": change.norm,
        "relative_norm": change.relative,
        "changed_fraction": change.fraction,
        "max_abs": change.largest,
    }


def _mismatches(found: Sequence[Mismatch]) -> list[dict[str, str]]:
    return [{"tensor": one.name, "a": one.a, "b": one.b} for one in found]


def _show_diff(answer: Mapping[str, Any]) -> None:
    for key in ("tensors", "layers"):
        print_rows(answer[key], Format.TABLE, empty="No float tensor can be compared.")
        out.print()
    lists = ("buffers_changed", "only_in_a", "only_in_b", "shapes_differ", "types_differ")
    total: dict[str, object] = {f"total_{key}": value for key, value in answer["total"].items()}
    for key in lists:
        found = answer[key]
        if key.endswith("differ"):
            found = [f"{one['tensor']}: {one['a']} and {one['b']}" for one in found]
        if found:
            total[key] = found
    print_record(total, Format.TABLE)
    if not answer["total"]["norm"] and len(total) == len(answer["total"]):
        out.print("Every value is the same in both.")


def similarity(
    base: BaseArgument,
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL…", help="Model folders, PEFT adapters and task vectors, mixed."
        ),
    ],
    picture: Annotated[
        Path | None, typer.Option(help="Draw it, too: a file that ends in .svg, .png or .html.")
    ] = None,
    per_layer: Annotated[bool, typer.Option("--per-layer", help="Say it by layer, too.")] = False,
    fmt: FormatOption = Format.TABLE,
) -> None:
    """Say how alike the changes of models against BASE are: cosines, and agreeing signs."""
    from coldmerge.core.checkpoint import Checkpoint
    from coldmerge.core.deltas import open_delta
    from coldmerge.core.digests import digest_of
    from coldmerge.core.progress import Counter
    from coldmerge.core.similarity import similarity as compare
    from coldmerge.core.similarity import touched

    if picture is not None:
        check_picture(picture)
    opened = Checkpoint.open(base)
    labels = names_of(models)
    with bars(fmt) as progress:
        digest = digest_of(opened, progress) if any(map(Path.is_file, models)) else ""
        deltas = [open_delta(opened, path, digest) for path in models]
        size = sum(opened.tensors[name].nbytes for name in touched(opened, deltas))
        found = compare(opened, deltas, labels, Counter("compare", size, progress).add)
    if picture is not None:
        from coldmerge.report.heatmap import write_picture

        caption = f"Changes against {base.resolve().name}, each over all tensors."
        write_picture("Similarity of changes", caption, _maps(found, per_layer), picture)
    if fmt is Format.JSON:
        print_json(_similarity_json(base, models, found, per_layer))
        return
    _show_similarity(found, per_layer)
    if picture is not None:
        out.print(f"Picture: {picture}", highlight=False)


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each path, all different: as many last parts as that takes."""
    whole = [str(path.resolve()).removesuffix(".safetensors") for path in paths]
    parts = [Path(path).parts for path in whole]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{one[-1]} ({number})" for number, one in enumerate(parts, 1)]


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be drawn, before anything is computed.

    Raises:
        ConfigError: no such kind of file, or the libraries are not installed.
    """
    if path.suffix not in PICTURES:
        raise ConfigError(
            "report.unknown_picture",
            f"{path.name} is not a kind of picture that is drawn.",
            expected=f"a name that ends in {', '.join(PICTURES)}",
            hint="Name the file cosines.png, for example.",
        )
    if not all(map(find_spec, ("altair", "vl_convert"))):
        raise ConfigError(
            "report.not_installed",
            "The libraries that draw pictures are not installed.",
            hint="Install them: pip install 'coldmerge[report]'.",
        )


def _numbers(matrix: Any) -> list[list[float | None]]:
    """A matrix as JSON has it: NaN is null."""
    return [[None if value != value else value for value in row] for row in matrix.tolist()]


def _similarity_json(
    base: Path, models: Sequence[Path], found: Similarity, per_layer: bool
) -> dict[str, object]:
    def sums(one: Sums) -> dict[str, object]:
        return {
            "norms": one.norms.tolist(),
            "cosine": _numbers(one.cosines),
            "sign_agreement": _numbers(one.sign_agreement),
        }

    answer: dict[str, object] = {
        "base": str(base),
        "models": [
            {"name": name, "path": str(path)}
            for name, path in zip(found.labels, models, strict=True)
        ],
        **sums(found.total),
    }
    if per_layer:
        answer["layers"] = [{"layer": name, **sums(one)} for name, one in found.layers.items()]
    return answer


def _show_similarity(found: Similarity, per_layer: bool) -> None:
    total = found.total
    digits = 3 if len(found.labels) <= 8 else 2
    tables = {"cosine between changes": total.cosines, "agreement of signs": total.sign_agreement}
    for title, matrix in tables.items():
        rows = [
            {
                title: f"{number} {label}",
                "norm": float(norm),
                **{str(n): _short(value, digits) for n, value in enumerate(values.tolist(), 1)},
            }
            for number, (label, norm, values) in enumerate(
                zip(found.labels, total.norms, matrix, strict=True), 1
            )
        ]
        print_rows(rows, Format.TABLE, empty="")
        out.print()
    if per_layer:
        layers = [
            {
                "mean cosine by layer": layer,
                **{str(n): _short(v, digits) for n, v in enumerate(with_others(sums), 1)},
            }
            for layer, sums in found.layers.items()
        ]
        print_rows(layers, Format.TABLE, empty="")


def _short(value: float | None, digits: int) -> str | None:
    """A number without a minus before zero; None for none and for NaN."""
    if value is None or value != value:
        return None
    return f"{round(value, digits) + 0:.{digits}f}"


def with_others(sums: Sums) -> list[float | None]:
    """For each change the mean of its cosines with the others; None where there is none."""
    found: list[float | None] = []
    for place, row in enumerate(sums.cosines.tolist()):
        others = [value for at, value in enumerate(row) if at != place and value == value]
        found.append(sum(others) / len(others) if others else None)
    return found


def _maps(found: Similarity, per_layer: bool) -> list[Heatmap]:
    from coldmerge.report.heatmap import Heatmap

    labels, total = found.labels, found.total
    maps = [
        Heatmap("Cosine between changes", labels, labels, _numbers(total.cosines)),
        Heatmap("Agreement of signs", labels, labels, _numbers(total.sign_agreement), low=0.0),
    ]
    if per_layer:
        layers = [with_others(sums) for sums in found.layers.values()]
        title = "Mean cosine with the others, by layer"
        maps.append(Heatmap(title, tuple(found.layers), labels, layers))
    return maps
