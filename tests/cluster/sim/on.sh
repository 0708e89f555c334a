#!/usr/bin/env bash
# on.sh FOLDER ctl|nI COMMAND...: run a command on the controller or on node I, in this folder and environment.
set -euo pipefail
folder=$1 node=$2
shift 2
enter=(nsenter --mount --net --uts --ipc --pid "--wdns=$PWD" --target)
ctl=("${enter[@]}" "$(<"$folder/run/init.pid")" --)
if [ "$node" = ctl ]; then exec "${ctl[@]}" "$@"; fi
# Node I's pid is known to the controller alone, so the way leads through it.
init=$("${ctl[@]}" cat "/run/nodes/$node") || { echo "on.sh: $node is off" >&2; exit 1; }
exec "${ctl[@]}" "${enter[@]}" "$init" -- "$@"
