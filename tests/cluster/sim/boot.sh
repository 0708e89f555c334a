#!/usr/bin/env bash
# boot.sh FOLDER I: power node I on and plug it in. Runs on "ctl" (by controller.sh and fault.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 i=$2

ip link del "veth$i" 2>/dev/null || true # a dead node's network lives on while its connections still send
setsid unshare --pid --fork --kill-child=KILL --mount --propagation private --net --uts --ipc --mount-proc \
  bash "$here/node.sh" "$i" </dev/null >>"$folder/log/node$i.log" 2>&1 &
outside=$!
init=
until [ -n "$init" ]; do
  read -r init _ <"/proc/$outside/task/$outside/children" || kill -0 "$outside"
  sleep 0.01
done
echo "$init" >"/run/nodes/n$i"
ip link add "veth$i" type veth peer name eth0 netns "$init"
ip link set "veth$i" master br0 up
