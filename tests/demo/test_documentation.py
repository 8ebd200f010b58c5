from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from coldmerge.core.errors import DataError
from coldmerge.demo import documentation
from coldmerge.demo.documentation import LIBRARIES, Library, task

ONE = '''"""The widget library's geometry of solids and of planes."""

import does_not_exist

raise SystemExit("this was run")


class Ball:
    """A ball {number} that rolls through widget space.

    Not this paragraph.
    """

    def area(self):
        """The area {number} of the ball, in square units."""

    def _hidden(self):
        """A private method {number} that nobody should read."""


def shared():
    """This sentence stands in two modules of the library."""


def short():
    """Short."""
'''


@pytest.fixture
def widget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An installed library of two modules whose code must never run."""
    root = tmp_path / "widget"
    for module in ("solids", "planes"):
        folder = root / module
        (folder / "tests").mkdir(parents=True)
        for number in range(15):
            (folder / f"_part{number}.py").write_text(ONE.format(number=f"{module} {number}"))
        (folder / "tests" / "test_it.py").write_text('"""A test docstring that is left out."""')
        (folder / "broken.py").write_text("def (")
    (root / "__init__.py").write_text('raise SystemExit("this was imported")')
    (root / "_private.py").write_text('"""The private module of the widget library."""')
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(LIBRARIES, "widget", Library("widget", "widget", ("widget",)))
    yield "widget"
    assert "widget" not in sys.modules


def test_texts_are_first_paragraphs_labelled_by_module(widget: str) -> None:
    found = task(widget)
    texts = {str(e.content): e.label for e in (*found.train, *found.validation, *found.test)}
    assert found.labels == ("planes", "solids")
    assert len(texts) == 2 * 2 * 15
    assert texts["A ball solids 3 that rolls through this library space."] == 1
    assert texts["The area planes 3 of the ball, in square units."] == 0
    assert not any("widget" in text.lower() or "private" in text for text in texts)
    assert not any("two modules" in text or "left out" in text for text in texts)


def test_the_same_seed_gives_the_same_task(widget: str) -> None:
    assert task(widget, 1) == task(widget, 1)
    assert task(widget, 1).test != task(widget, 2).test


def test_a_real_library_has_labels_enough() -> None:
    found = task("networkx")
    assert 4 <= len(found.labels) <= documentation.MAX_MODULES
    assert any(label.startswith("algorithms.") for label in found.labels)
    assert all(25 <= len(str(example.content)) <= 300 for example in found.train)


@pytest.mark.parametrize("name", ["nosuch", "absent"])
def test_unknown_and_missing_libraries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LIBRARIES, "absent", Library("absent", "no_such_package_here", ()))
    with pytest.raises(DataError) as caught:
        task(name)
    assert caught.value.code in {"demo.unknown_library", "demo.not_installed"}
