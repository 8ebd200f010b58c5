"""The demo's real text: the documentation of installed libraries.

Each contributor is one library. A text is the first paragraph of a public docstring, its
label the module of the library that it documents. Sources are read with `ast`: nothing is
imported or run, and nothing is shipped with coldmerge.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coldmerge.core.errors import DataError
from coldmerge.demo.folders import Example, Task, split

MAX_MODULES = 8
MAX_TEXTS = 160
MIN_TEXTS = 20
LENGTH = range(25, 301)
READ_AHEAD = 2 * MAX_TEXTS
RULER = re.compile(r"[-=~*]{4,}")
SKIPPED = frozenset(
    {"conftest", "distutils", "encodings", "ensurepip", "extern", "externals", "idlelib"}
    | {"lib2to3", "pydoc_data", "setup", "site-packages", "test", "testing", "testing_utils"}
    | {"tests", "turtledemo", "vendor"}
)


@dataclass(frozen=True)
class Library:
    """An installed library whose documentation is a task.

    `deeper` names modules whose children, not they themselves, are the labels.
    `words` are what the texts call the library: they are masked.
    """

    name: str
    package: str
    words: tuple[str, ...]
    deeper: tuple[str, ...] = ()


LIBRARIES = {
    library.name: library
    for library in (
        Library("stdlib", "", ("python", "cpython")),
        Library("scipy", "scipy", ("scipy",)),
        Library("scikit-learn", "sklearn", ("scikit-learn", "scikit", "sklearn")),
        Library("sympy", "sympy", ("sympy",)),
        Library("torch", "torch", ("torch", "pytorch")),
        Library("transformers", "transformers", ("transformers", "hugging face", "huggingface")),
        Library("networkx", "networkx", ("networkx", "nx"), ("algorithms",)),
        Library("pandas", "pandas", ("pandas", "pd"), ("core",)),
        Library("numpy", "numpy", ("numpy", "np")),
    )
}
SEEN = ("stdlib", "scipy", "scikit-learn", "sympy", "torch", "transformers")
UNSEEN = ("networkx", "pandas", "numpy")


def task(name: str, seed: int = 0) -> Task:
    """The texts of one installed library, split into train, validation and test.

    Raises:
        DataError: the library is not known here, or not installed.

    """
    library = LIBRARIES.get(name)
    if library is None:
        raise DataError(
            "demo.unknown_library",
            f"The demo has no task called {name}.",
            expected=", ".join(sorted(LIBRARIES)),
            got=name,
            hint="Name some of these in --seen and --unseen, or give your own with --data DIR.",
        )
    by_module = _texts(library, _root(library))
    labels = sorted(
        sorted(by_module, key=lambda module: (-len(by_module[module]), module))[:MAX_MODULES]
    )
    labels = [module for module in labels if len(by_module[module]) >= MIN_TEXTS]
    examples = [
        Example(text, number)
        for number, module in enumerate(labels)
        for text in by_module[module][:MAX_TEXTS]
    ]
    return split(name, examples, labels, seed)


def _root(library: Library) -> Path:
    if not library.package:
        return Path(sysconfig.get_path("stdlib"))
    found = importlib.util.find_spec(library.package)
    if found is None or found.origin is None:
        raise DataError(
            "demo.not_installed",
            f"The library {library.name}, whose documentation is a task, is not installed.",
            hint="Install the demo's libraries: pip install 'coldmerge[demo]'.",
        )
    return Path(found.origin).parent


def _texts(library: Library, root: Path) -> dict[str, list[str]]:
    """Texts by module, each module in a fixed shuffled order, none in two modules."""
    mask = re.compile(rf"\b({'|'.join(map(re.escape, library.words))})\b", re.IGNORECASE)
    found: dict[str, list[str]] = {}
    owners: dict[str, set[str]] = {}
    for module, files in _modules(library, root).items():
        texts: dict[str, None] = {}
        for path in files:
            texts.update(dict.fromkeys(_clean(_docstrings(path), mask)))
            if len(texts) >= READ_AHEAD:
                break
        found[module] = list(texts)
        for text in texts:
            owners.setdefault(text.casefold(), set()).add(module)
    return {
        module: _shuffled([text for text in texts if len(owners[text.casefold()]) == 1])
        for module, texts in found.items()
    }


def _modules(library: Library, root: Path) -> dict[str, list[Path]]:
    """Source files by the module they document, in an order that mixes each module's parts."""
    modules: dict[str, list[Path]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        depth = 2 if len(parts) > 1 and parts[0] in library.deeper else 1
        label = parts[:depth]
        if SKIPPED & set(parts) or any(part.startswith("_") for part in label):
            continue
        if not library.package and label[0] not in sys.stdlib_module_names:
            continue
        modules.setdefault(".".join(label), []).append(path)
    return {
        module: sorted(paths, key=lambda path: _mix(path.relative_to(root).as_posix()))
        for module, paths in modules.items()
    }


def _mix(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _shuffled(texts: Sequence[str]) -> list[str]:
    ordered = sorted(texts)
    random.Random(0).shuffle(ordered)  # noqa: S311 - no secret, only an order
    return ordered


def _docstrings(path: Path) -> Iterator[str]:
    """Docstrings of the module's public classes and functions, and of the module itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    pending: list[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef] = [tree]
    while pending:
        node = pending.pop()
        text = ast.get_docstring(node)
        if text:
            yield text
        if isinstance(node, ast.Module | ast.ClassDef):
            pending += [
                child
                for child in node.body
                if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not child.name.startswith("_")
            ]


def _clean(docstrings: Iterator[str], mask: re.Pattern[str]) -> Iterator[str]:
    for docstring in docstrings:
        paragraph = docstring.strip().split("\n\n", 1)[0]
        text = mask.sub("this library", " ".join(RULER.split(paragraph)[0].split()))
        if len(text) in LENGTH and text.isascii() and text[0].isalpha():
            yield text
