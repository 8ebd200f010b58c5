"""`coldmerge doctor`: one check after the other, each with what to do about it.

A check never raises: what goes wrong is its result. Later checks that cannot run because
an earlier one failed are left out.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import ssl
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from coldmerge import __version__
from coldmerge.core.clock import Clock, SystemClock
from coldmerge.core.errors import ColdmergeError
from coldmerge.core.files import existing
from coldmerge.wire.invitation import root_fingerprint
from coldmerge.wire.version import PROTOCOL
from coldmerge_client import sent_log
from coldmerge_client.home import Home, Membership
from coldmerge_client.outbox import Outbox
from coldmerge_client.policy import SendPolicy
from coldmerge_client.renewal import renew, validity
from coldmerge_client.session import Session
from coldmerge_client.training.config import DataConfig, TrainConfig

Status = Literal["ok", "warn", "fail"]
_PROXIES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy")
_LITTLE_SPACE = 5 * 10**9


@dataclass(frozen=True)
class Check:
    """One finding. `hint` says what to do when it is not ok."""

    name: str
    status: Status
    detail: str
    hint: str = ""


def examine(home: Home, *, timeout: float = 10.0, clock: Clock | None = None) -> Iterator[Check]:
    """Run all checks in order, each given as soon as it is known."""
    clock = clock or SystemClock()
    yield Check("version", "ok", f"coldmerge {__version__}, protocol {PROTOCOL}")
    yield _disk(home)
    yield _proxies()
    yield from _training_stack()
    joined = _guard("home", lambda: _membership(home))
    yield joined
    if joined.status == "fail":
        return
    yield _guard("keys", lambda: _keys(home))
    yield _guard("policy", lambda: _policy(home))
    yield _guard("sent log", lambda: _sent_log(home))
    yield _guard("outbox", lambda: _outbox(home))
    yield from _configs(home)
    yield from _network(home, timeout, clock)


def _guard(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except ColdmergeError as error:
        got = f" ({error.got})" if error.got else ""
        return Check(name, "fail", f"{error.message}{got}", error.hint)
    except OSError as error:
        return Check(name, "fail", str(error), "Check that you may read and write this folder.")


def _disk(home: Home) -> Check:
    folder = existing(home.path)
    free = shutil.disk_usage(folder).free
    detail = f"{free / 1e9:.1f} GB free"
    if not os.access(folder, os.W_OK):
        return Check("disk", "fail", f"{folder} is not writable", "Set COLDMERGE_HOME elsewhere.")
    if free < _LITTLE_SPACE:
        hint = "A release, its fine-tune and its task vector need about four times the model."
        return Check("disk", "warn", detail, hint)
    return Check("disk", "ok", detail)


def _proxies() -> Check:
    found = {
        name: value
        for name in _PROXIES
        if (value := os.environ.get(name) or os.environ.get(name.upper()))
    }
    shown = ", ".join(f"{name}={_without_password(value)}" for name, value in found.items())
    return Check("proxies", "ok", shown or "none set")


def _without_password(value: str) -> str:
    scheme, mark, rest = value.rpartition("://")
    return f"{scheme}{mark}{rest.rpartition('@')[2]}"


def _training_stack() -> Iterator[Check]:
    missing = [
        name
        for name in ("torch", "transformers", "peft", "datasets", "sklearn")
        if importlib.util.find_spec(name) is None
    ]
    if missing:
        hint = "Run `pip install 'coldmerge[client]'`."
        yield Check("training", "warn", f"not installed: {', '.join(missing)}", hint)
        return
    import torch

    yield Check("training", "ok", f"torch {torch.__version__}")
    if torch.cuda.is_available():
        yield Check("gpu", "ok", str(torch.cuda.get_device_name(0)))
    else:
        yield Check("gpu", "ok", f"none; {torch.get_num_threads()} threads on the processor")


def _membership(home: Home) -> Check:
    member = home.membership()
    who = f"{member.contributor}/{member.machine} ({member.role}) in {member.federation}"
    return Check("home", "ok", f"{home.path}: {who}")


def _keys(home: Home) -> Check:
    home.identity_key()
    home.tls_private_key()
    mode = stat.S_IMODE(home.tls_key.parent.stat().st_mode)
    if mode & 0o077:
        return Check(
            "keys", "warn", f"mode of keys/ is {mode:o}", f"chmod 700 {home.tls_key.parent}"
        )
    return Check("keys", "ok", "readable by you alone")


def _policy(home: Home) -> Check:
    policy = SendPolicy.load(home.policy)
    asks = "a person is asked" if policy.require_approval else "no approval asked"
    return Check("policy", "ok", f"{asks}, {policy.encoding}")


def _sent_log(home: Home) -> Check:
    return Check("sent log", "ok", f"{len(sent_log.read(home))} lines, all signed and in order")


def _outbox(home: Home) -> Check:
    pending = [entry.id for entry in Outbox(home).pending()]
    if pending:
        hint = "Run `coldmerge push` or `coldmerge contribute` again: it goes on."
        return Check("outbox", "warn", f"not sent yet: {', '.join(pending)}", hint)
    return Check("outbox", "ok", "nothing waits")


def _configs(home: Home) -> Iterator[Check]:
    folder = home.path / "models"
    for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else ():
        yield _guard(f"data of {path.stem}", partial(_data, path))


def _data(path: Path) -> Check:
    from coldmerge_client.training import data

    config = TrainConfig.load(path)
    readers: dict[str, Callable[[DataConfig], data.Examples[Any]]] = {
        "sequence-classification": data.classification,
        "token-classification": data.tokens,
        "causal-lm": data.texts,
    }
    name = f"data of {path.stem}"
    if config.trainer not in readers:
        return Check(name, "ok", f"read by the trainer {config.trainer}")
    found = readers[config.trainer](config.data)
    detail = f"{len(found.train)} training and {len(found.validation)} validation items"
    detail += f", {len(found.labels)} labels" if found.labels else ""
    if found.dropped:
        hint = "Rows without text are left out."
        return Check(name, "warn", f"{detail}; {found.dropped} empty rows", hint)
    return Check(name, "ok", detail)


def _network(home: Home, timeout: float, clock: Clock) -> Iterator[Check]:
    member = home.membership()
    trusted = _guard("root", lambda: Check("root", "ok", root_fingerprint(home.root())))
    yield trusted
    if trusted.status == "fail":
        return
    root = home.root().decode("ascii")
    reached = True
    for name, address in (("enrolment port", member.enrol), ("api port", member.address)):
        check = _reach(name, address, root, timeout)
        reached = reached and check.status != "fail"
        yield check
    if not reached:
        return
    yield _guard("certificate", lambda: _certificate(home, clock))
    yield _guard("coordinator", lambda: _answers(home, timeout, clock, member))


def _reach(name: str, address: str, root: str, timeout: float) -> Check:
    """Name, connection, then TLS with the federation's root alone.

    With a proxy set, a direct connection need not work: that is a warning then.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    context = ssl.create_default_context(cadata=root)
    proxied = any(os.environ.get(n) or os.environ.get(n.upper()) for n in _PROXIES[:3])
    try:
        with socket.create_connection((host, int(port)), timeout) as connection:
            context.set_alpn_protocols(["h2"])
            with context.wrap_socket(connection, server_hostname=host) as tls:
                return Check(name, "ok", f"{address}, {tls.version()}")
    except socket.gaierror as error:
        problem, hint = f"{host} has no address ({error.strerror})", "Check the name and your DNS."
    except ssl.SSLCertVerificationError as error:
        problem = f"its certificate is not by this federation ({error.verify_message})"
        hint = "Check clock and address; a TLS-inspecting proxy must let this address through."
        return Check(name, "fail", problem, hint)
    except (OSError, ValueError) as error:
        problem, hint = f"{address}: {error}", "Check that the coordinator runs, and firewalls."
    return Check(name, "warn" if proxied else "fail", problem, hint)


def _certificate(home: Home, clock: Clock) -> Check:
    """A renewal proves the identity key, and that the clocks agree within five minutes."""
    renew(home, clock=clock)
    end = validity(home)[1]
    detail = f"renewed, valid until {end:%Y-%m-%d %H:%M} UTC; the clocks agree"
    return Check("certificate", "ok", detail)


def _answers(home: Home, timeout: float, clock: Clock, member: Membership) -> Check:
    with Session.open(home, timeout=timeout, clock=clock) as session:
        models = session.models()
    shown = ", ".join(f"{model.name} (release {model.latest_number})" for model in models)
    return Check("coordinator", "ok", f"knows {member.contributor}; models: {shown or 'none yet'}")
