"""The engine `ray`: Flower's simulation runtime, under a SuperLink on loopback of its own.

`RAY_ADDRESS` attaches a cluster that runs; its nodes must see the run's folder.
"""

from __future__ import annotations

import os
import re

import grpc

from coldmerge.core.errors import ConfigError, UnavailableError
from coldmerge.core.progress import Progress
from coldmerge_simulation.engines import superlink
from coldmerge_simulation.engines.processes import Programs, answers, free_ports
from coldmerge_simulation.folder import RunFolder

ANSWER_SECONDS = 10.0
LOCAL_ADDRESSES = ("", "local", "auto")
_CLUSTER_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
_CLIENT_METHOD = "/ray.rpc.RayletDriver/ClusterInfo"
"""What a cluster's head answers, and the server of its remote clients (`ray://`)."""
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
        UnavailableError: nobody answers there, or somebody else than Ray does.
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
    if not answers(found[1].strip("[]"), int(found[2]), ANSWER_SECONDS):
        got: str | None = f"no connection within {ANSWER_SECONDS:g} s"
    elif os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        got = None  # with keys that are Ray's affair
    else:
        method = _CLIENT_METHOD if address.startswith("ray://") else _CLUSTER_METHOD
        got = _trouble(f"{found[1]}:{found[2]}", method)
    if got is not None:
        raise UnavailableError(
            "simulation.no_cluster",
            "The Ray cluster does not answer.",
            expected=f"a Ray cluster at {address}",
            got=got,
            hint="Look with `ray status --address ADDRESS`, or unset RAY_ADDRESS.",
        )


def _trouble(target: str, method: str) -> str | None:
    """Why what listens there is no Ray, which speaks gRPC; None: it is."""
    options = [("grpc.enable_http_proxy", 0)]
    with grpc.insecure_channel(target, options=options) as channel:
        ask = channel.unary_unary(method)
        try:
            ask(b"", timeout=ANSWER_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            code = error.code()
            if code == grpc.StatusCode.UNIMPLEMENTED:
                return "another gRPC service than Ray"
            if code in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                return f"a connection, and no word of Ray's within {ANSWER_SECONDS:g} s"
    return None
