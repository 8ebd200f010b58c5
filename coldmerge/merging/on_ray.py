"""The engine for more than one machine: groups of tensors as tasks of a Ray cluster.

Every machine must see the inputs and the output under the same paths (a shared file
system): tasks read the inputs themselves and write their tensors in place, so that no
tensor travels through Ray. The bytes are those of the engine on one machine.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge.core.progress import Counter, Progress
from coldmerge.merging.folder import Work
from coldmerge.merging.pool import Pool

TASKS_PER_PROCESSOR = 4
"""Enough that a slow machine delays the end by little, few enough that start-up is small."""

KNOCK_SECONDS = 10


def on_ray(work: Work, threads: int | None, progress: Progress) -> dict[str, str]:
    """Merge on the cluster at `RAY_ADDRESS`, or the one that runs on this machine.

    `threads` are those of one task; by default one, and as many tasks as processors.

    Raises:
        ConfigError: Ray is not installed.
        UnavailableError: there is no cluster, or a task cannot see the files.
    """
    ray = _ray()
    mine = not ray.is_initialized()
    _connect(ray)
    try:
        return _merge(ray, work, threads or 1, progress)
    finally:
        if mine:
            ray.shutdown()


def _merge(ray: Any, work: Work, threads: int, progress: Progress) -> dict[str, str]:
    with Pool() as pool:
        work.job.survey(pool)
    count = Counter("merge", work.nbytes, progress)
    shared = ray.put(work)
    task = ray.remote(num_cpus=threads, max_retries=2)(_write)
    processors = int(ray.cluster_resources().get("CPU", 1))
    bins = _bins(work, max(1, processors // threads) * TASKS_PER_PROCESSOR)
    waiting = {task.remote(shared, names, threads): names for names in bins}
    digests: dict[str, str] = {}
    while waiting:
        finished, _ = ray.wait(list(waiting), num_returns=1)
        for reference in finished:
            names = waiting.pop(reference)
            digests.update(_result(ray, reference))
            count.add(sum(work.size(name) for name in names))
    return digests


def _write(work: Work, names: Sequence[str], threads: int) -> dict[str, str]:
    try:
        with Pool(threads) as pool:
            digests = work.write(names, pool, lambda _: None)
        work.slots.sync()
        return digests
    finally:
        work.slots.close()


def _result(ray: Any, reference: Any) -> dict[str, str]:
    try:
        found: dict[str, str] = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if error.cause is not None:
            raise error.cause from error
        raise _lost(error) from error
    except ray.exceptions.RayError as error:
        raise _lost(error) from error
    return found


def _lost(error: Exception) -> UnavailableError:
    return UnavailableError(
        "ray.task_failed",
        "A task of the Ray cluster failed, and so did its repetitions.",
        got=str(error).strip().splitlines()[-1],
        hint="Look at `ray status` and the workers' logs, then run the command again.",
    )


def _bins(work: Work, most: int) -> list[list[str]]:
    """The tensors in at most `most` groups of about equal size, the largest first."""
    names = sorted(work.planned, key=lambda name: (-work.size(name), name))
    bins: list[list[str]] = [[] for _ in range(min(most, len(names)))]
    filled = [0] * len(bins)
    for name in names:
        least = filled.index(min(filled))
        bins[least].append(name)
        filled[least] += work.size(name)
    return bins


def _ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            "ray.not_installed",
            "The Ray engine needs a library that is not installed.",
            expected="ray",
            hint="pip install 'coldmerge[ray]'",
        ) from error
    return ray


def _connect(ray: Any) -> None:
    address = os.environ.get("RAY_ADDRESS", "auto")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of its future
    try:
        _knock(address)
        ray.init(
            address=address,
            ignore_reinit_error=True,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (OSError, ray.exceptions.RaySystemError, ValueError) as error:
        raise UnavailableError(
            "ray.no_cluster",
            "There is no Ray cluster to merge on.",
            expected=f"a cluster at {address}",
            got=str(error).strip().splitlines()[0],
            hint="Start one with `ray start --head`, or name one in RAY_ADDRESS.",
        ) from error


def _knock(address: str) -> None:
    """Fail at once where nobody listens: Ray itself tries for minutes, then ends the process.

    Raises:
        OSError: nobody does.
    """
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=KNOCK_SECONDS).close()
