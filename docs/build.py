"""Write docs/errors.md, docs/cli.md and the methods of docs/merging.md from the source.

`python docs/build.py [--check]`
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "coldmerge",
    "coordinator/coldmerge_coordinator",
    "client/coldmerge_client",
    "simulation/coldmerge_simulation",
)


@dataclass(frozen=True)
class RaiseSite:
    """One place that makes an error: literals of its arguments, `…` for what is computed."""

    kind: str
    code: str
    message: str
    hint: str


def raise_sites() -> Iterator[RaiseSite]:
    """Every construction of an error with a literal code, in the four packages."""
    from coldmerge.core.errors import KINDS

    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and _name(node.func) in KINDS and len(node.args) >= 2:
                    code = node.args[0]
                    if not (isinstance(code, ast.Constant) and isinstance(code.value, str)):
                        continue
                    hint = next((k.value for k in node.keywords if k.arg == "hint"), None)
                    yield RaiseSite(
                        _name(node.func), code.value, _literal(node.args[1]), _literal(hint)
                    )


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")


def _literal(node: ast.expr | None) -> str:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_literal(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _literal(left) + _literal(right)
        case _:
            return "…"


def errors_page() -> str:
    """The page of all error codes, by area."""
    from coldmerge.core.errors import KINDS

    areas: dict[str, dict[str, list[RaiseSite]]] = defaultdict(lambda: defaultdict(list))
    for site in raise_sites():
        areas[site.code.split(".")[0]][site.code].append(site)
    lines = [
        "# Errors",
        "",
        "Every error has a code. Commands print it in brackets, `--format json` puts it in",
        "`error.code`, and the gRPC status carries it in `coldmerge-error-bin`. The class",
        "decides the exit status of the command and the gRPC status. An `…` stands for what",
        "the message fills in. This page is made from the source by `python docs/build.py`.",
        "",
        "| class | exit status | gRPC status |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {kind.exit_status} | {kind.grpc_status} |" for name, kind in KINDS.items()
    ]
    for area in sorted(areas):
        lines += ["", f"## {area}", ""]
        for code in sorted(areas[area]):
            sites = areas[area][code]
            lines.append(f"- **`{code}`** ({', '.join(sorted({s.kind for s in sites}))}):")
            for message, hint in sorted({(s.message, s.hint) for s in sites}):
                lines.append(f"  {_escape(message)} *{_escape(hint)}*")
    return "\n".join(lines) + "\n"


def _escape(text: str) -> str:
    return " ".join(text.split()).replace("*", "\\*").replace("<", "&lt;")


def cli_page() -> str:
    """The page of all commands with their options, from the command tree itself."""
    import typer.main

    from coldmerge.cli.app import app

    lines = ["# Command line", "", "Made from the program by `python docs/build.py`.", ""]
    for path, command in _commands(typer.main.get_command(app), ("coldmerge",)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([*path, *(_metavar(a) for a in arguments), "[OPTIONS]" * bool(options)])
        lines += [
            f"## {' '.join(path)}",
            "",
            f"`{usage.strip()}`",
            "",
            (command.help or "").strip(),
        ]
        if command.epilog:
            lines += ["", f"`{command.epilog.removeprefix('Example: ')}`"]
        if arguments or options:
            lines += ["", "| option | meaning | default |", "|---|---|---|"]
        lines += [f"| `{_metavar(a)}` | {_cell(getattr(a, 'help', ''))} | |" for a in arguments]
        lines += [
            f"| `{' / '.join([*o.opts, *o.secondary_opts])}` | {_cell(o.help)} | {_default(o)} |"
            for o in options
        ]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    if command.invoke_without_command:
        yield path, command
    for name in sorted(children):
        yield from _commands(children[name], (*path, name))


def _metavar(argument: Any) -> str:
    text = (argument.metavar or argument.name or "").upper()
    return text if argument.required else f"[{text}]"


def _cell(text: str | None) -> str:
    return (text or "").replace("|", "\\|")


def _default(option: Any) -> str:
    value = option.default
    if value is None or value is False or callable(value) or value == () or value == "":
        return ""
    return f"`{getattr(value, 'value', value)}`"


METHODS_BEGIN, METHODS_END = "<!-- methods: made from the source -->", "<!-- end of methods -->"


def merging_page() -> str:
    """The page on merging as it is, with every method's parameters from its fields."""
    from coldmerge.merging.plan.describe import methods

    before, _, rest = (ROOT / "docs" / "merging.md").read_text().partition(METHODS_BEGIN)
    _, _, after = rest.partition(METHODS_END)
    sections = [_method(method) for method in methods()]
    return before + "\n\n".join([METHODS_BEGIN, *sections, METHODS_END]) + after


def _method(method: Any) -> str:
    sees = {"tensor": "one tensor at a time", "global": "the whole model"}[method.scope]
    takes = {"elements": "", "rows": ", in whole rows", "whole": ", whole"}[method.cut]
    base = {
        "origin": "required, and no input",
        "optional": "optional; without it weights are merged, not changes",
        "input": "an input like the others, and optional",
    }[method.base]
    lines = [f"### {method.name}", "", method.paper, *([method.details] if method.details else [])]
    lines += ["", f"Sees {sees}{takes}. `base_model`: {base}."]
    if method.needs:
        lines[-1] += f" Inputs must ship: {', '.join(method.needs)}."
    if method.parameters:
        lines += ["", "| parameter | of | type | range | default | |", "|---|---|---|---|---|---|"]
    for one in method.parameters:
        lines.append(
            f"| `{one.word}` | {'each model' if one.per_input else 'the merge'} | {one.kind} "
            f"| {one.range} | {_value(one)} | {_cell(one.meaning)} |"
        )
    return "\n".join(lines)


def _value(parameter: Any) -> str:
    if parameter.required:
        return "required"
    value = parameter.default
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ", ".join(f"`{item}`" for item in value)
    return "" if value is None else f"{value}"


PAGES = {"errors.md": errors_page, "cli.md": cli_page, "merging.md": merging_page}


def main() -> int:
    """Write the pages, or with --check say which are stale."""
    stale = []
    for name, page in PAGES.items():
        path, text = ROOT / "docs" / name, page()
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(text)
    print(("stale: " if "--check" in sys.argv else "written: ") + (", ".join(stale) or "nothing"))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
