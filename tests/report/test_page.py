from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from coldmerge.report.charts import TaskGain, task_gains
from coldmerge.report.page import Code, Figure, Page, Table, render

HOSTILE = "</script><script>alert(1)</script>"


def page() -> Page:
    gains = [TaskGain(HOSTILE, "seen", 2.0), TaskGain("plain", "unseen", -1.0)]
    return Page(
        title=f"A page about {HOSTILE}",
        lead="What it is.",
        numbers=[("seen", "+5.2 points")],
        sections=[
            Figure("Gains", "A caption.", task_gains(gains)),
            Table("Rows", "", ["name", "points"], [[HOSTILE, "1.0"]], frozenset({1})),
            Code("Typed", "", ["coldmerge demo", HOSTILE]),
        ],
        footer="The end.",
    )


class Structure(HTMLParser):
    """Tags that open scripts, and attributes that could reach for another file."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0
        self.reaches: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag == "script"
        self.reaches += [f"{tag} {name}" for name, _ in attrs if name in {"src", "href"}]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def html() -> str:
    return render(page())


def test_the_page_needs_no_other_file_and_text_stays_text(html: str) -> None:
    found = Structure()
    found.feed(html)
    assert found.scripts == 1
    assert found.reaches == []
    assert "default-src 'none'" in html
    for word in ("A page about", "+5.2 points", "A caption.", "coldmerge demo", "The end."):
        assert word in found.text
    assert "<td class=number>1.0</td>" in html


def test_the_picture_is_there_without_scripts(html: str) -> None:
    before_scripts = html.partition("<script")[0]
    assert re.search(r"<div class='picture' id='picture-0'><svg", before_scripts)


def test_prose_in_a_table_breaks_its_lines() -> None:
    table = Table(
        "T", "", ["what", "much"], [["a long sentence", "1"]], frozenset({1}), frozenset({0})
    )
    html = render(Page("P", "", [], [table]))
    assert "<td class=prose>a long sentence</td><td class=number>1</td>" in html


def test_a_page_without_pictures_has_no_script() -> None:
    assert "<script" not in render(Page("t", "l", [], [Code("c", "", ["x"])]))


def test_a_browser_draws_it_with_the_network_shut(html: str, tmp_path: Path) -> None:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no Chromium here")
    file = tmp_path / "report.html"
    file.write_text(html, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=5000"]
    shut = ["--proxy-server=127.0.0.1:9", f"--user-data-dir={tmp_path / 'profile'}"]
    found = subprocess.run(
        [chromium, *options, *shut, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert 'class="picture vega-embed"' in found
    assert "+2.0" in found
