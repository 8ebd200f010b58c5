"""docs/merging.md says what plans and methods are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coldmerge.merging.plan import load
from coldmerge.merging.plan.describe import Method, methods
from coldmerge.merging.plan.parameters import check_words
from coldmerge.merging.plan.plan import TOP

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "merging.md").read_text()


def test_the_plan_on_the_page_is_one(tmp_path: Path) -> None:
    found = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert found
    for text in found:
        (tmp_path / "plan.yaml").write_text(text)
        check_words(load(tmp_path / "plan.yaml"))


@pytest.mark.parametrize("word", sorted(TOP))
def test_every_word_of_a_plan_is_documented(word: str) -> None:
    assert re.search(rf"`{word}\b", PAGE)


@pytest.mark.parametrize("method", methods(), ids=lambda method: method.name)
def test_every_method_has_its_section_with_all_parameters(method: Method) -> None:
    section = PAGE.partition(f"\n### {method.name}\n")[2].partition("\n### ")[0]
    words = [parameter.word for parameter in method.parameters]
    assert section
    assert [word for word in words if f"| `{word}` |" not in section] == []
