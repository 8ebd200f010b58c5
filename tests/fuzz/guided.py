"""One target under atheris, guided by coverage, in its own process: libFuzzer never returns."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

with atheris.instrument_imports(include=["coldmerge", "coldmerge_coordinator", "coldmerge_client"]):
    from tests.fuzz.headers import clear_scratch
    from tests.fuzz.targets import TARGETS

from tests.fuzz.engine import Judge

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BYTES = 2**14


def main(name: str, inputs: int, seconds: float, seed: int, findings: Path, out: Path) -> None:
    """Fuzz until `inputs` were tried (0: no limit) or `seconds` are over; write the result.

    The corpus grows in the folder of `out`, which the caller removes.
    """
    target = TARGETS[name]
    judge = Judge(target, findings)
    began = time.monotonic()

    def one(data: bytes) -> None:
        judge.try_input(data)
        passed = time.monotonic() - began
        if passed > seconds or judge.result.inputs == inputs:
            judge.result.seconds = passed
            out.write_text(json.dumps(judge.result.as_dict()))
            clear_scratch()
            os._exit(0)

    corpus = out.parent / "corpus"
    corpus.mkdir()
    for file, data in target.corpus().items():
        (corpus / file).write_bytes(data)
    options = [f"-seed={seed}", f"-max_len={MAX_BYTES}", str(corpus)]
    if target.tokens:
        words = out.parent / "words"
        words.write_text("".join(f'"{_escaped(token)}"\n' for token in target.tokens))
        options.append(f"-dict={words}")
    _fuzz(one, options)


def _escaped(token: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in token)


def _fuzz(one: Callable[[bytes], None], options: list[str]) -> None:
    atheris.Setup([sys.argv[0], "-rss_limit_mb=0", "-timeout=600", *options], one)
    atheris.Fuzz()


if __name__ == "__main__":
    _name, _inputs, _seconds, _seed, _findings, _out = sys.argv[1:]
    main(_name, int(_inputs), float(_seconds), int(_seed), Path(_findings), Path(_out))
