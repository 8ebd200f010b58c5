"""The wire: channels, calls, errors and the generated `coldmerge.v1` stubs."""

from __future__ import annotations

import os

# gRPC's C core writes failed handshakes to stderr; ours are errors with a hint.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
