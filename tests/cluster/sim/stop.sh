#!/usr/bin/env bash
# stop.sh FOLDER: power everything off. With pid 1 the kernel ends all processes and frees namespaces, bridge and links.
set -euo pipefail
folder=$(realpath -m "${1:?folder}")
[ -e "$folder/run/init.pid" ] || exit 0
init=$(<"$folder/run/init.pid")
rm -f "$folder/run/init.pid" "$folder/run/ready"

# The number may belong to another process by now.
[[ $(tr '\0' ' ' 2>/dev/null <"/proc/$init/cmdline") == *"controller.sh $folder "* ]] || exit 0
kill -KILL "$init" 2>/dev/null || exit 0
for _ in {1..750}; do
  # kill -0 would find a zombie, which stays for a while on a machine whose pid 1 reaps late.
  case $(awk '/^State/ {print $2}' "/proc/$init/status" 2>/dev/null) in '' | Z) exit 0 ;; esac
  sleep 0.02
done
echo "stop.sh: process $init did not end in 15 s" >&2
exit 1
