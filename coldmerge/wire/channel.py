"""Channels to a coordinator, and the options both ends must agree on."""

from __future__ import annotations

from pathlib import Path

import grpc

MAX_MESSAGE_BYTES = 4 * 2**20
MAX_DOCUMENT_IN_MESSAGE = MAX_MESSAGE_BYTES - 4096
"""Room for a document, or a release's listing, in a message with all that goes beside it."""
CHUNK_BYTES = 2**20
KEEPALIVE_MS = 30_000
KEEPALIVE_TIMEOUT_MS = 20_000
STREAMS_PER_CONNECTION = 100
HANDSHAKE_TIMEOUT_MS = 10_000
IDLE_CONNECTION_MS = 15 * 60_000

Options = list[tuple[str, int | str]]


def client_options(address: str) -> Options:
    """Channel options of a client. Loopback never goes through a proxy."""
    options: Options = [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 5_000),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
    ]
    if _is_local(address):
        options.append(("grpc.enable_http_proxy", 0))
    return options


def server_options() -> Options:
    """Server options: as strict about size, and patient enough for the client's pings."""
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.http2.max_ping_strikes", 5),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_TIMEOUT_MS),
        ("grpc.max_connection_idle_ms", IDLE_CONNECTION_MS),
    ]


def _is_local(address: str) -> bool:
    host = address.rsplit(":", 1)[0].strip("[]")
    return address.startswith("unix:") or host in {"localhost", "::1"} or host.startswith("127.")


def secure_channel(
    address: str,
    root_pem: bytes,
    chain_pem: bytes | None = None,
    key_pem: bytes | None = None,
) -> grpc.Channel:
    """A TLS channel that trusts only the federation's root.

    With `chain_pem` and `key_pem` (the leaf, then the intermediate) it is mutual TLS.
    Proxies are taken from the usual variables (`https_proxy`, `no_proxy`).
    """
    credentials = grpc.ssl_channel_credentials(
        root_certificates=root_pem, private_key=key_pem, certificate_chain=chain_pem
    )
    return grpc.secure_channel(
        address,
        credentials,
        options=client_options(address),
        compression=grpc.Compression.NoCompression,
    )


def local_channel(socket_path: Path) -> grpc.Channel:
    """A channel to the admin socket: who may open the file may call."""
    target = socket_target(socket_path)
    return grpc.insecure_channel(target, options=client_options(target))


def socket_target(socket_path: Path) -> str:
    """The gRPC name of a Unix socket."""
    return f"unix:{socket_path.absolute()}"
