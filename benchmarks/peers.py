"""Environments of the programs that benchmarks compare with, built once and reused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

PINS = (("torch", "2.13.0"), ("mergekit", "0.1.5"))
HOME = Path("~/.cache/coldmerge").expanduser()
BUILD_SECONDS = 3600.0
PROBE_SECONDS = 120.0
PROBE = """\
from importlib.metadata import version
print(*(version(name).partition("+")[0] for name in {names}))
"""


def mergekit(folder: Path | None = None) -> Path:
    """The `mergekit-yaml` of an environment with the pinned versions, built if there is none.

    Raises:
        SystemExit: it cannot be built, or `folder` holds something else.
    """
    folder = folder or HOME / "mergekit-{}".format(dict(PINS)["mergekit"])
    command = folder / "bin" / "mergekit-yaml"
    if _sound(folder) and command.is_file():
        return command
    if folder.exists() and any(folder.iterdir()) and not (folder / "pyvenv.cfg").is_file():
        raise SystemExit(f"{folder} is not empty and no Python environment. Name another folder.")
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], f"making {folder}")
    for name, version in PINS:
        wanted = f"{name}=={version}"
        pip = ("-m", "pip", "install", "-q", "--disable-pip-version-check")
        _run([folder / "bin" / "python", *pip, wanted], f"installing {wanted}")
    if not _sound(folder) or not command.is_file():
        raise SystemExit(f"{folder} was built, but has no working mergekit. Remove it, try again.")
    return command


def _sound(folder: Path) -> bool:
    python = folder / "bin" / "python"
    names = tuple(name for name, _ in PINS)
    try:
        found = subprocess.run(
            [python, "-c", PROBE.format(names=names)],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return found.stdout.split() == [version for _, version in PINS]


def _run(command: Sequence[str | Path], what: str) -> None:
    print(f"mergekit's environment: {what}", file=sys.stderr, flush=True)
    try:
        subprocess.run(command, check=True, timeout=BUILD_SECONDS, capture_output=True, text=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise SystemExit(
            f"{said[-4000:]}\nmergekit's environment could not be built: {what} failed. "
            "Check the network, or leave mergekit out with --no-peer."
        ) from error
