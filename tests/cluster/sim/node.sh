#!/usr/bin/env bash
# node.sh I: pid 1 of node I (by boot.sh). It ends only by SIGKILL from outside, which is a loss of power.
set -euo pipefail
i=$1

hostname "n$i"
# A /run of its own that shares only munge's socket, which is a path and therefore crosses networks.
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/munge /mnt/gpu
mount --rbind /run/munge /mnt/munge
mount --no-mtab --move /mnt /run
mount -t tmpfs tmpfs /var/spool
mkdir /var/spool/slurmd
mount -t tmpfs tmpfs /dev/shm
mount -t sysfs sysfs /sys # lists this network's interfaces

# SLURM hands out character devices and nothing else: each pretend GPU is another /dev/null.
gpus=$(</etc/slurm/gpus)
for ((g = 0; g < gpus; g++)); do mknod --mode=666 "/run/gpu/nvidia$g" c 1 3; done

ip link set lo up
until ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done # boot.sh plugs it in
ip addr add "10.88.0.$((10 + i))/24" dev eth0
ip link set eth0 up
slurmd -D -N "n$i" &
while :; do
  sleep 3600 &
  wait "$!" || true
done
