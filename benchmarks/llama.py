"""Models with the shapes of a Llama and random weights: a base, and fine-tunes of it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coldmerge.core.checkpoint import Checkpoint
from coldmerge.core.checkpoint_writer import CheckpointWriter
from coldmerge.core.dtypes import NUMPY, blocks, from_float32, nbytes
from coldmerge.core.header import TensorSpec

LAYERS = 12
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DEVIATION = 0.02
MOVE = 1e-3
"""Standard deviations of a base weight, and of what a fine-tune adds to it."""


@dataclass(frozen=True)
class Llama:
    """Twelve layers of this width, embeddings tied. Width 768 has 109.5 million parameters."""

    width: int

    @classmethod
    def of(cls, parameters: int) -> Llama:
        """The shape whose size is nearest to `parameters`, at least width 8."""
        per_square = LAYERS * 12 + 32000 / 768
        return cls(8 * max(1, round(math.sqrt(parameters / per_square) / 8)))

    @property
    def inner(self) -> int:
        """Width of the feed-forward layers."""
        return 8 * round(self.width / 3)

    @property
    def vocabulary(self) -> int:
        """Number of embeddings."""
        return round(self.width * 32000 / 768)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, by name, sorted."""
        width, inner = self.width, self.inner
        found: dict[str, tuple[int, ...]] = {
            "model.embed_tokens.weight": (self.vocabulary, width),
            "model.norm.weight": (width,),
        }
        for number in range(LAYERS):
            layer = f"model.layers.{number}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                found[f"{layer}.{name}.weight"] = (width,)
            for name in "qkvo":
                found[f"{layer}.self_attn.{name}_proj.weight"] = (width, width)
            found[f"{layer}.mlp.down_proj.weight"] = (width, inner)
            for name in ("gate", "up"):
                found[f"{layer}.mlp.{name}_proj.weight"] = (inner, width)
        return dict(sorted(found.items()))

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in self.shapes().values())

    def config(self, dtype: str) -> bytes:
        """The content of config.json."""
        heads = math.gcd(self.width // 8, LAYERS)
        fields = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_attention_heads": heads,
            "num_hidden_layers": LAYERS,
            "num_key_value_heads": heads,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
            "vocab_size": self.vocabulary,
        }
        return (json.dumps(fields, indent=2) + "\n").encode()


def write(folder: Path, shape: Llama, dtype: str, *, base: Path | None = None, seed: int) -> Path:
    """A model folder, one block in memory at a time; with `base`, a fine-tune of that folder.

    `dtype` is one of `DTYPES`. The same seed writes the same bytes.
    """
    stored = DTYPES[dtype]
    source = None if base is None else Checkpoint.open(base)
    specs = [
        TensorSpec(name, stored, extents, 0, nbytes(stored, extents))
        for name, extents in shape.shapes().items()
    ]
    with CheckpointWriter(folder) as writer:
        writer.declare(specs)
        for place, spec in enumerate(specs):
            generator = np.random.default_rng([seed, place])
            for start, stop in blocks(spec.size):
                values = generator.standard_normal(stop - start, np.float32)
                values *= np.float32(DEVIATION if source is None else MOVE)
                if source is not None:
                    values += source.block(spec.name, start, stop)
                writer.write(spec.name, from_float32(values, stored))
        writer.write_file("config.json", shape.config(dtype))
    return folder


def size_in_bytes(shape: Llama, dtype: str) -> int:
    """Bytes of the weights of one model."""
    return shape.parameters * NUMPY[DTYPES[dtype]].itemsize
