"""The engine `ray`: Flower's simulation runtime, under a SuperLink on loopback of its own.

`RAY_ADDRESS` attaches a cluster that runs; its nodes must see the run's folder.
"""

from __future__ import annotations

import os
import re

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge.core.progress import Progress
from coldmerge_simulation.engines import superlink
from coldmerge_simulation.engines.processes import Programs, answers, free_ports
from coldmerge_simulation.folder import RunFolder

LOCAL_ADDRESSES = ("", "local", "auto")
_ADDRESS = re.compile(r"(?:ray://)?(\[[^\]]+\]|[^:/\[\]]+):(\d{1,5})")


def run(folder: RunFolder, nodes: int, progress: Progress) -> None:
    """See `Engine`."""
    check_cluster(os.environ.get("RAY_ADDRESS", ""))
    (port,) = free_ports(1)
    address = f"127.0.0.1:{port}"
    home = superlink.write_connection(folder, address)
    app = superlink.write_app(folder, "folder")
    with Programs(home / "logs", {"FLWR_HOME": str(home)}) as programs:
        server = programs.start(
            "superlink",
            "flower-superlink",
            *("--insecure", "--simulation", "--disable-runtime-dependency-installation"),
            *("--host", "127.0.0.1", "--port", str(port)),
        )
        programs.until(
            "opened its port",
            lambda: answers("127.0.0.1", port),
            server,
            superlink.START_SECONDS,
        )
        resources = f"num-supernodes={nodes} client-resources-num-cpus=1"
        running = superlink.hand_in(programs, folder, app, "--federation-config", resources)
        superlink.watch(folder, running, server, progress)


def check_cluster(address: str) -> None:
    """Look whether the cluster of `RAY_ADDRESS` answers: Ray itself would wait for long.

    Raises:
        ConfigError: it is no address.
        UnavailableError: nobody answers there.
    """
    if address in LOCAL_ADDRESSES:
        return
    found = _ADDRESS.fullmatch(address)
    if found is None:
        raise ConfigError(
            "simulation.bad_cluster",
            "RAY_ADDRESS is not the address of a Ray cluster.",
            expected="host:port, such as 10.0.0.5:6379",
            got=address,
            hint="Correct the variable, or unset it to run on this machine.",
        )
    if not answers(found[1].strip("[]"), int(found[2]), 10.0):
        raise UnavailableError(
            "simulation.no_cluster",
            "The Ray cluster does not answer.",
            expected=f"a Ray cluster at {address}",
            got="no connection within 10 s",
            hint="Look with `ray status --address ADDRESS`, or unset RAY_ADDRESS.",
        )
