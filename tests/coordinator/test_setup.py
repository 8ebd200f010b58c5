"""Making a coordinator's folder."""

from __future__ import annotations

from pathlib import Path

from coldmerge_coordinator import setup


def test_a_folder_that_was_open_to_all_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir(mode=0o755)
    setup.init(folder, federation="test")
    assert folder.stat().st_mode & 0o777 == 0o700
