"""The engine `federation`: a SuperLink and SuperNodes on loopback, with TLS and node keys.

Releases and task vectors travel in messages as bytes, and each SuperNode keeps models in a folder
of its own below `nodes/`. Contributors' data and heads are where every engine finds them.

`COLDMERGE_SUPERLINK` (host:port) and `COLDMERGE_SUPERLINK_CA` name a SuperLink that runs, on the
machine of the run's folder, as deploy/flower shows: then nothing is started but the run.
"""

from __future__ import annotations

import os
from pathlib import Path

from coldmerge.core.errors import UnavailableError
from coldmerge.core.progress import Progress
from coldmerge_simulation.config import SimulationConfig
from coldmerge_simulation.engines import credentials, superlink
from coldmerge_simulation.engines.credentials import HOST, Credentials
from coldmerge_simulation.engines.processes import Programs, answers, free_ports
from coldmerge_simulation.folder import RunFolder

REGISTER_SECONDS = 300.0


def run(folder: RunFolder, nodes: int, progress: Progress) -> None:
    """See `Engine`. The SuperNodes share the contributors among them."""
    given = os.environ.get("COLDMERGE_SUPERLINK", "")
    if given:
        _attached(folder, given, progress)
        return
    config = SimulationConfig.parse(folder.config()["config"])
    count = min(nodes, config.supernodes)
    port, *own = free_ports(1 + count)
    keys = folder.path / "flower" / "keys"
    made = credentials.make(keys)
    home = superlink.write_connection(folder, f"{HOST}:{port}", made.authority)
    app = superlink.write_app(folder, "messages")
    with Programs(home / "logs", {"FLWR_HOME": str(home)}) as programs:
        server = programs.start(
            "superlink",
            "flower-superlink",
            *("--ssl-certfile", made.certificate, "--ssl-keyfile", made.key),
            *("--ssl-ca-certfile", made.authority, "--enable-supernode-auth"),
            *("--disable-runtime-dependency-installation", "--host", HOST, "--port", str(port)),
        )
        programs.until(
            "opened its port", lambda: answers(HOST, port), server, superlink.START_SECONDS
        )
        for part, at in enumerate(own):
            _node(programs, folder, made, part, count, f"{HOST}:{port}", at)
        running = superlink.hand_in(programs, folder, app)
        superlink.watch(folder, running, server, progress)


def _attached(folder: RunFolder, address: str, progress: Progress) -> None:
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and answers(host.strip("[]"), int(port), 10.0)):
        raise UnavailableError(
            "simulation.no_superlink",
            "The SuperLink does not answer.",
            expected="host:port of a SuperLink in COLDMERGE_SUPERLINK",
            got=address,
            hint="Start it as deploy/flower/superlink.sh does, or unset the variable.",
        )
    authority = os.environ.get("COLDMERGE_SUPERLINK_CA")
    trusted = None if authority is None else Path(authority).absolute()
    home = superlink.write_connection(folder, address, trusted)
    app = superlink.write_app(folder, "messages")
    with Programs(home / "logs", {"FLWR_HOME": str(home)}) as programs:
        superlink.watch(folder, superlink.hand_in(programs, folder, app), None, progress)


def _node(
    programs: Programs,
    folder: RunFolder,
    made: Credentials,
    part: int,
    count: int,
    address: str,
    port: int,
) -> None:
    """Make a key, tell the SuperLink, and start a SuperNode with it."""
    name = f"supernode-{part}"
    key = credentials.make_node_key(made.key.with_name(name))
    public = key.with_name(f"{name}.pub")
    told = programs.start(f"register-{part}", "flwr", "supernode", "register", public, "run")
    programs.finish(told, REGISTER_SECONDS)
    programs.start(
        name,
        "flower-supernode",
        *("--root-certificates", made.authority, "--superlink", address),
        *("--auth-supernode-private-key", key, "--host", HOST, "--port", str(port)),
        *(
            "--node-config",
            node_config(folder, part, count),
        ),
    )


def node_config(folder: RunFolder, part: int, count: int) -> str:
    """What a SuperNode is told: which contributors it plays, and where its things are.

    Data and homes are the run's, so that the run goes on with other SuperNodes, or none.
    """
    home = folder.path / "nodes" / str(part)
    home.mkdir(parents=True, exist_ok=True)
    places = f'home="{home}" data="{folder.data}" homes="{folder.homes}"'
    return f"partition-id={part} num-partitions={count} {places}"
