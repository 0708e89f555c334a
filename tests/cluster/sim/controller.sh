#!/usr/bin/env bash
# controller.sh FOLDER NODES LIFELINE: pid 1 of the cluster, and its controller and login node "ctl" (by start.sh).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 nodes=$2 lifeline=$3

hostname ctl
ip link set lo up
ip link add br0 type bridge
ip addr add 10.88.0.1/24 dev br0
ip link set br0 up

mount --bind "$folder/etc/hosts" /etc/hosts
mount --bind "$folder/etc" /etc/slurm
# A name that no node has fails at once instead of after a name server's time-out.
if [ -e /etc/resolv.conf ]; then mount --bind "$folder/etc/resolv.conf" /etc/resolv.conf; fi
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/spool
mkdir -p /run/munge /run/nodes /var/spool/slurmctld

chmod 755 /run/munge # munged refuses a folder that its clients cannot enter
munged --key-file="$folder/etc/munge.key" --pid-file=/run/munge/pid --seed-file=/run/munge/seed \
  --log-file="$folder/log/munged.log" --num-threads=2
slurmctld -D </dev/null &
slurmctld=$!
for i in $(seq "$nodes"); do bash "$here/boot.sh" "$folder" "$i"; done

until [ "$(sinfo --noheader --Node --partition=main --states=idle --format=%N 2>/dev/null | wc -l)" = "$nodes" ]; do
  kill -0 "$slurmctld"
  sleep 0.05
done
touch "$folder/run/ready"

# When this process ends the kernel ends all others and frees their namespaces. Meanwhile bash reaps orphans.
trap 'exit 0' TERM
if [ -n "$lifeline" ]; then
  while read -r _; do :; done
  exit 0
fi
while :; do
  sleep 3600 &
  wait "$!" || true
done
