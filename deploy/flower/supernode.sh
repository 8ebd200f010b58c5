#!/bin/sh
# A SuperNode: PART of PARTS, counted from 0. Once: ssh-keygen -t ecdsa -b 384 -N '' -f keys/node,
# and on the SuperLink's machine: flwr supernode register node.pub run
# HOME_FOLDER keeps heads and models; DATA has a folder for each contributor, org-1 and so on.
set -eu
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
exec flower-supernode \
  --superlink "$SUPERLINK" --root-certificates keys/ca.crt \
  --auth-supernode-private-key keys/node \
  --host 127.0.0.1 --port "${PORT:-9094}" \
  --node-config "partition-id=$PART num-partitions=$PARTS home=\"$HOME_FOLDER\" data=\"$DATA\""
