#!/bin/sh
# The SuperLink of a federation of researchers, on the machine that holds the run's folder.
# Certificates: any authority's, for this machine's name; SuperNodes are let in by their keys.
# Whoever reaches this port can start code on every SuperNode: keep it inside a private network.
set -eu
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-superlink \
  --host 0.0.0.0 --port "${PORT:-8000}" \
  --ssl-certfile keys/server.pem --ssl-keyfile keys/server.key --ssl-ca-certfile keys/ca.crt \
  --enable-supernode-auth --database superlink.db \
  --disable-runtime-dependency-installation
