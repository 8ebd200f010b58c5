"""Makes the mergekit oracle vectors beside this file; the README there says what they hold.

Run it from the root of the repository with the Python of an environment that has mergekit:

    python -m venv ENV
    ENV/bin/pip install torch==2.13.0
    ENV/bin/pip install mergekit==0.1.5
    ENV/bin/python tests/oracles/make_mergekit.py

The same versions give the same files, byte for byte: everything is seeded.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mergekit.merge_methods.api import merge_tensors  # type: ignore[import-not-found,unused-ignore]
from mergekit.sparsify import (  # type: ignore[import-not-found,unused-ignore]
    RescaleNorm,
    magnitude,
    magnitude_outliers,
)
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
OUT = HERE / "mergekit"
SOURCES = 5
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
TRIMMED = {"ties", "breadcrumbs", "breadcrumbs_ties"}
ELECTED = {"ties", "breadcrumbs_ties", "dare_ties", "della", "sce"}
WEIGHTED = {"ties", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic", "linear", "della"} | {
    "dare_ties",
    "dare_linear",
    "della_linear",
    "nuslerp",
    "multislerp",
}


@dataclass(frozen=True)
class Case:
    """One call of a method; `each` is one mapping for all inputs or one per input."""

    name: str
    method: str
    sources: int
    shared: Mapping[str, Any] = field(default_factory=dict)
    each: Sequence[Mapping[str, Any]] = ()
    base: bool = True
    dtypes: tuple[str, ...] = ("f32",)

    def per_model(self) -> list[dict[str, Any]]:
        """The parameters of each input but the base."""
        found = [dict(one) for one in self.each] or [{}]
        found = found * self.sources if len(found) == 1 else found
        for one in found:
            if self.method in WEIGHTED:
                one.setdefault("weight", 1.0)
        return found


def _weights(*values: float) -> list[dict[str, float]]:
    return [{"weight": value} for value in values]


def _trims(weights: Sequence[float], densities: Sequence[float]) -> list[dict[str, float]]:
    return [{"weight": w, "density": d} for w, d in zip(weights, densities, strict=True)]


BOTH = ("f32", "bf16")
UNEVEN = _weights(0.5, 2.0, 0.25)
MIXED = _trims([0.7, 1.3, -0.4], [0.2, 0.5, 0.9])
CASES = [
    Case("linear-1", "linear", 1, base=False),
    Case("linear-5", "linear", 5, base=False, dtypes=BOTH),
    Case("linear-weights", "linear", 3, each=UNEVEN, base=False, dtypes=BOTH),
    Case("linear-sum", "linear", 3, {"normalize": False}, UNEVEN, base=False),
    Case("slerp-0.3", "slerp", 1, {"t": 0.3}, dtypes=BOTH),
    Case("slerp-0", "slerp", 1, {"t": 0.0}),
    Case("slerp-1.4", "slerp", 1, {"t": 1.4}),
    Case("nuslerp", "nuslerp", 2, each=_weights(0.3, 0.9), base=False, dtypes=BOTH),
    Case("nuslerp-base", "nuslerp", 2, each=_weights(0.3, 0.9)),
    Case("nuslerp-last", "nuslerp", 2, {"nuslerp_flatten": False}, base=False),
    Case(
        "nuslerp-first",
        "nuslerp",
        2,
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
        _weights(0.3, 0.9),
    ),
    Case("nuslerp-half", "nuslerp", 2, each=_weights(1.0, -1.0), base=False),
    Case("multislerp-1", "multislerp", 1, base=False),
    Case("multislerp-2", "multislerp", 2, base=True),
    Case("multislerp-3", "multislerp", 3, each=UNEVEN, base=False, dtypes=BOTH),
    Case("multislerp-base", "multislerp", 5),
    Case("multislerp-raw", "multislerp", 3, {"normalize_weights": False}, UNEVEN, base=False),
    Case("task_arithmetic-1", "task_arithmetic", 1, {"lambda": 0.3}),
    Case("task_arithmetic-5", "task_arithmetic", 5, {"lambda": 0.3}, dtypes=BOTH),
    Case("task_arithmetic-forget", "task_arithmetic", 2, each=_weights(1.0, -0.6)),
    Case("task_arithmetic-mean", "task_arithmetic", 3, {"normalize": True}, UNEVEN),
    Case("task_arithmetic-zero-sum", "task_arithmetic", 2, {"normalize": True}, _weights(1, -1)),
    Case("ties-1", "ties", 1, each=[{"density": 0.2}]),
    Case("ties-2", "ties", 2, each=[{"density": 0.2}]),
    Case("ties-3-weights", "ties", 3, {"lambda": 1.5}, MIXED, dtypes=BOTH),
    Case("ties-5", "ties", 5, each=[{"density": 0.2}], dtypes=BOTH),
    Case("ties-5-full", "ties", 5),
    Case("ties-sum", "ties", 5, {"normalize": False, "lambda": 0.4}, [{"density": 0.5}]),
    Case("ties-rescale", "ties", 3, {"rescale": True}, [{"density": 0.2}], dtypes=BOTH),
    Case("ties-tiny", "ties", 3, each=[{"density": 0.001}]),
    Case("dare_linear-1.0", "dare_linear", 3, each=UNEVEN),
    Case("dare_ties-1.0", "dare_ties", 3, each=UNEVEN, dtypes=BOTH),
    Case("dare_ties-1.0-mean", "dare_ties", 5, {"normalize": True, "lambda": 0.7}),
    Case("della-1.0", "della", 3, each=UNEVEN),
    Case("della_linear-1.0", "della_linear", 3, each=UNEVEN),
    Case("breadcrumbs-default", "breadcrumbs", 3),
    Case("breadcrumbs-3", "breadcrumbs", 3, each=[{"density": 0.5, "gamma": 0.05}], dtypes=BOTH),
    Case(
        "breadcrumbs-rescale",
        "breadcrumbs",
        2,
        {"rescale": True, "lambda": 0.5},
        _trims([0.4, 0.8], [0.15, 0.9]),
    ),
    Case("breadcrumbs-top", "breadcrumbs", 2, each=[{"density": 0.9, "gamma": 0.3}]),
    Case("breadcrumbs_ties", "breadcrumbs_ties", 5, each=[{"density": 0.5, "gamma": 0.05}]),
    Case("breadcrumbs_ties-mean", "breadcrumbs_ties", 3, {"normalize": True}, MIXED, dtypes=BOTH),
    Case("sce-1", "sce", 1, {"select_topk": 0.5}),
    Case("sce-3-full", "sce", 3),
    Case("sce-3", "sce", 3, {"select_topk": 0.3}, dtypes=BOTH),
    Case("sce-5", "sce", 5, {"select_topk": 0.1}),
    Case("model_stock-2", "model_stock", 2),
    Case("model_stock-5", "model_stock", 5, dtypes=BOTH),
    Case("model_stock-rows", "model_stock", 3, {"filter_wise": True}, dtypes=BOTH),
    Case("karcher-1", "karcher", 1, base=False),
    Case("karcher-2", "karcher", 2, base=False),
    Case("karcher-5", "karcher", 5, base=False, dtypes=BOTH),
    Case("karcher-base", "karcher", 3),
    Case("karcher-short", "karcher", 3, {"max_iter": 2, "tol": 1e-3}, base=False),
]


def checkpoints() -> dict[str, dict[str, torch.Tensor]]:
    """The base and its fine-tunes in float32, by file name."""
    generator = torch.Generator().manual_seed(20260301)
    shapes = {
        "cube": (3, 4, 5),
        "identical": (5, 7),
        "lattice": (7, 9),
        "opposed": (4, 5),
        "single": (1,),
        "slight": (6, 11),
        "tall": (29, 5),
        "unchanged": (5, 9),
        "vector": (17,),
        "wide": (7, 23),
        "zeros": (4, 6),
    }

    def normal(shape: Sequence[int], scale: float) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    base = {name: normal(shape, 0.5) for name, shape in shapes.items()}
    base["zeros"].zero_()

    def steps(name: str, most: int, unit: int) -> torch.Tensor:
        return torch.randint(-most, most + 1, shapes[name], generator=generator) / unit

    base["lattice"], base["opposed"] = steps("lattice", 8, 16), steps("opposed", 8, 16)
    identical, opposed = normal(shapes["identical"], 0.1), steps("opposed", 200, 1024)
    found = {"base": base}
    for number in range(1, SOURCES + 1):
        delta = {name: normal(shape, 0.05 * number) for name, shape in shapes.items()}
        delta["identical"], delta["opposed"] = identical, opposed * (-1) ** number
        delta["lattice"] = steps("lattice", 3, 64)
        delta["slight"] *= 1e-3
        for name in ("unchanged", "zeros"):
            delta[name].zero_()
        found[f"tuned-{number}"] = {name: base[name] + delta[name] for name in shapes}
    return found


def merge(
    case: Case, tensors: Sequence[torch.Tensor], dtype: torch.dtype, out: torch.dtype
) -> torch.Tensor:
    """mergekit's result for one tensor; the base is last, where a plan file puts it."""
    each = case.per_model()
    parameters = dict(case.shared)
    for key in each[0]:
        parameters[key] = [one[key] for one in each]
    merged: torch.Tensor = merge_tensors(
        tensors,
        case.method,
        parameters=parameters,
        base_index=len(tensors) - 1 if case.base else None,
        dtype=dtype,
        out_dtype=out,
    )
    return merged.contiguous()


def _cuts(size: int, case: Case, one: Mapping[str, Any]) -> list[int]:
    """Places in the descending order of magnitude between kept and dropped elements."""
    density = one.get("density", 1.0)
    if density >= 1:
        return []
    if case.method == "ties":
        return [max(1, int(density * size))]
    kept, top = int(density * size), int(one.get("gamma", 0.01) * size)
    bottom = max(0, size - kept - top)
    return [size - bottom - kept, size - bottom]


def _trim(case: Case, delta: torch.Tensor, one: Mapping[str, Any]) -> torch.Tensor:
    norm = RescaleNorm.l1 if case.shared.get("rescale") else None
    if case.method == "ties":
        kept: torch.Tensor = magnitude(delta, one.get("density", 1.0), norm)
    else:
        kept = magnitude_outliers(delta, one.get("density", 1.0), norm, one.get("gamma", 0.01))
    return kept


def left_open(case: Case, tensors: Sequence[torch.Tensor]) -> list[int]:
    """Flat places where ties leave the result open, or where mergekit's own precision decides."""
    exact = merge(case, tensors, torch.float64, torch.float64)
    gap = (exact - merge(case, tensors, torch.float32, torch.float64)).abs().flatten()
    found = gap > 2e-6 * exact.abs().max()
    if case.base and case.method in TRIMMED | ELECTED:
        found |= _tied_ranks(case, tensors)
    return [int(place) for place in found.nonzero().flatten()]


def _tied_ranks(case: Case, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    deltas = [(one.float() - tensors[-1].float()).flatten() for one in tensors[:-1]]
    found = torch.zeros(deltas[0].numel(), dtype=torch.bool)
    each = case.per_model()
    if case.method in TRIMMED:
        for delta, one in zip(deltas, each, strict=True):
            ordered = delta.abs().sort(descending=True).values
            for cut in _cuts(delta.numel(), case, one):
                if 0 < cut < len(ordered) and ordered[cut - 1] == ordered[cut] > 0:
                    found |= delta.abs() == ordered[cut]
        deltas = [_trim(case, delta, one) for delta, one in zip(deltas, each, strict=True)]
    if case.method == "sce" and case.shared.get("select_topk", 1.0) < 1:
        found |= _tied_variance(torch.stack(deltas), case.shared["select_topk"])
    if case.method in ELECTED:
        weights = torch.tensor([one.get("weight", 1.0) for one in each])
        found |= _tied_election(torch.stack(deltas) * weights[:, None])
    return found


def _tied_variance(deltas: torch.Tensor, share: float) -> torch.Tensor:
    variance = deltas.double().var(dim=0, unbiased=False)
    cut = int(int(torch.count_nonzero(variance)) * share)
    ordered = variance.sort(descending=True).values
    if not 0 < cut < len(ordered) or ordered[cut - 1] - ordered[cut] > 1e-5 * ordered[cut - 1]:
        return torch.zeros(len(ordered), dtype=torch.bool)
    return (variance - ordered[cut]).abs() <= 2e-5 * ordered[cut]


def _tied_election(deltas: torch.Tensor) -> torch.Tensor:
    """Sums so small that rounding decides their sign; zero in every order is no such tie."""
    orders = [deltas.sum(0), deltas.flip(0).sum(0), deltas.double().sum(0).float()]
    zero = torch.stack([total == 0 for total in orders]).all(0)
    return ~zero & (orders[2].abs() <= 1e-5 * deltas.abs().sum(0))


def write_inputs() -> dict[str, dict[str, torch.Tensor]]:
    """Writes every checkpoint in every type; returns them by path below this folder."""
    found = {}
    for file, tensors in checkpoints().items():
        for short, dtype in DTYPES.items():
            path = f"mergekit/{file}-{short}.safetensors"
            found[path] = {name: tensor.to(dtype) for name, tensor in tensors.items()}
            save_file(found[path], HERE / path)
    return found


def run(case: Case, short: str, inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> dict[str, Any]:
    """One entry of cases.json, its expected tensors written."""
    paths = [
        f"mergekit/tuned-{number}-{short}.safetensors" for number in range(1, 1 + case.sources)
    ]
    base = f"mergekit/base-{short}.safetensors" if case.base else None
    expected, refused, places_left = {}, {}, {}
    for name in inputs[paths[0]]:
        tensors = [inputs[path][name] for path in [*paths, *([base] if base else [])]]
        try:
            expected[name] = merge(case, tensors, torch.float32, DTYPES[short])
        except ValueError as error:
            refused[name] = str(error)
            continue
        if places := left_open(case, tensors):
            places_left[name] = places
    file = f"mergekit/expected/{case.name}-{short}.safetensors"
    save_file(expected, HERE / file)
    return {
        "name": f"{case.name}-{short}",
        "method": case.method,
        "parameters": dict(case.shared),
        "inputs": paths,
        "per_model": case.per_model(),
        "base": base,
        "dtype": "float32",
        "out_dtype": str(DTYPES[short]).removeprefix("torch."),
        "expected": file,
        "open": places_left,
        "refused": refused,
    }


def entries(inputs: Mapping[str, Mapping[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
    """Every case in every type it names."""
    for case in CASES:
        for short in case.dtypes:
            yield run(case, short, inputs)


def main() -> None:
    """Write everything anew."""
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "expected").mkdir(parents=True)
    inputs = write_inputs()
    lines = [json.dumps(entry) for entry in entries(inputs)]
    (HERE / "cases.json").write_text("[\n" + ",\n".join(lines) + "\n]\n")


if __name__ == "__main__":
    main()
