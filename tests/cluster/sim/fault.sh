#!/usr/bin/env bash
# fault.sh FOLDER OPERATION nI: what happens to nodes.
#   kill, boot     loss of power; power on
#   cut, heal      the cable is out; in
#   drop, undrop   packets are lost in silence, the link looks up; no longer
#   hang, unhang   slurmd, not its jobs, is stopped; goes on
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 operation=$2 node=$3
port=veth${node#n}
on() { "$here/on.sh" "$folder" "$@"; }

case $operation in
  kill)
    on ctl ip link del "$port" # first, or the dying processes would still close their connections in good order
    on ctl kill -KILL "$(on ctl cat "/run/nodes/$node")"
    on ctl rm "/run/nodes/$node"
    ;;
  boot) on ctl bash "$here/boot.sh" "$folder" "${node#n}" ;;
  cut) on ctl ip link set "$port" down ;;
  heal) on ctl ip link set "$port" up ;;
  drop) on ctl bridge link set dev "$port" state 0 ;;
  undrop) on ctl bridge link set dev "$port" state 3 ;;
  hang) on "$node" kill -STOP "$(on "$node" cat /run/slurmd.pid)" ;;
  unhang) on "$node" kill -CONT "$(on "$node" cat /run/slurmd.pid)" ;;
  *)
    echo "fault.sh: unknown operation $operation" >&2
    exit 2
    ;;
esac
