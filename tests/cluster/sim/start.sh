#!/usr/bin/env bash
# start.sh FOLDER NODES: a real SLURM on this machine, its controller "ctl" and nodes n1, n2, ..., up when this returns.
#
# Every node is a network, pid, host-name, ipc and mount namespace of its own on a bridge. Nothing of it is seen outside:
# no interface, no route, no mount, no change in /etc. /tmp and the repository are the file system that all nodes share;
# /run, /var/spool and /dev/shm are each node's own. Needs root. In the environment:
#   GPUS=8       pretend GPUs a node (none): jobs may ask for them and get CUDA_VISIBLE_DEVICES
#   KILL_WAIT=2  seconds from SIGTERM to SIGKILL
#   LIFELINE=1   the cluster ends when this command's standard input does: with the process that holds the pipe
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
folder=$(realpath -m "${1:?folder}")
nodes=${2:?number of nodes}
gpus=${GPUS:-0}
mkdir -p "$folder"/{etc,log,run}
rm -f "$folder/run/ready" "$folder/run/init.pid"

hosts='127.0.0.1 localhost'
add_host() {
  # PyTorch sees its peers under IPv4-mapped addresses, and warns of those without a name.
  hosts+=$'\n'"$1 $2"$'\n'"::ffff:$1 $2"
}
add_host 10.88.0.1 ctl
lines=
for i in $(seq "$nodes"); do
  address=10.88.0.$((10 + i))
  add_host "$address" "n$i"
  lines+="NodeName=n$i NodeAddr=$address SocketsPerBoard=2 CoresPerSocket=8 ThreadsPerCore=1 RealMemory=2000000"
  if [ "$gpus" -gt 0 ]; then lines+=" Gres=gpu:$gpus"; fi
  lines+=$'\n'
done

conf=$(<"$here/slurm.conf.in")
conf=${conf//@FOLDER@/$folder}
conf=${conf//@KILL_WAIT@/${KILL_WAIT:-2}}
conf=${conf//@ID@/$$} # jobs of clusters that run side by side are told apart by it
printf '%s\n' "${conf//@NODES@/$lines}" >"$folder/etc/slurm.conf"
echo "$gpus" >"$folder/etc/gpus"
if [ "$gpus" -gt 0 ]; then
  printf 'Name=gpu File=/run/gpu/nvidia[0-%d] Flags=nvidia_gpu_env\n' "$((gpus - 1))" >"$folder/etc/gres.conf"
fi
# Otherwise slurmd looks for the version of cgroups at /sys/fs/cgroup, where a container may have nothing.
echo 'CgroupPlugin=cgroup/v1' >"$folder/etc/cgroup.conf"
printf '%s\n' "$hosts" >"$folder/etc/hosts"
: >"$folder/etc/resolv.conf"
(umask 077 && head -c 128 /dev/urandom >"$folder/etc/munge.key")

exec 3</dev/null
if [ -n "${LIFELINE:-}" ]; then exec 3<&0; fi # a background command's own standard input is /dev/null
setsid unshare --pid --fork --kill-child=KILL --mount --propagation private --net --uts --ipc --mount-proc \
  bash "$here/controller.sh" "$folder" "$nodes" "${LIFELINE:-}" \
  <&3 3<&- >"$folder/log/controller.log" 2>&1 &
outside=$!

trap 'kill -KILL "$outside" 2>/dev/null || true; tail -n 20 "$folder"/log/*.log >&2' ERR

end=$((SECONDS + 60))
until [ -e "$folder/run/ready" ]; do
  if ! kill -0 "$outside" 2>/dev/null; then
    echo 'start.sh: the controller ended' >&2
    false
  elif [ "$SECONDS" -ge "$end" ]; then
    echo 'start.sh: not ready after 60 s' >&2
    false
  fi
  sleep 0.05
done
read -r init _ <"/proc/$outside/task/$outside/children" || [ -n "$init" ] # the line has no end
echo "$init" >"$folder/run/init.pid"
