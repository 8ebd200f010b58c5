"""Files beside the weights that a plan changes: the configuration's type, the chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from coldmerge.core.checkpoint import Checkpoint, read_json

TEMPLATE = "chat_template.jinja"
_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def configuration(base: Checkpoint, dtype: str | None) -> dict[str, bytes]:
    """config.json that names `dtype`, if it must change and there is one."""
    if dtype is None or not (base.folder / "config.json").is_file():
        return {}
    config = base.config
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) == _WORDS[dtype]:
        return {}
    config[key] = _WORDS[dtype]
    return {"config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}


def chat_template(wanted: str | None, folders: Iterable[Path]) -> dict[str, bytes]:
    """The chat template of the merged model: `wanted`, or for `auto` the inputs' most common."""
    if wanted == "auto":
        found = Counter(filter(None, map(_template, folders)))
        wanted = found.most_common(1)[0][0] if found else None
    return {TEMPLATE: wanted.encode()} if wanted else {}


def _template(folder: Path) -> str | None:
    if (folder / TEMPLATE).is_file():
        return (folder / TEMPLATE).read_text("utf-8").strip()
    if (folder / "tokenizer_config.json").is_file():
        found = read_json(folder / "tokenizer_config.json").get("chat_template")
        return found.strip() if isinstance(found, str) else None
    return None
