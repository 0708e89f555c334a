#!/usr/bin/env bash
# install.sh: what the tests in tests/cluster need, where this may be installed. Without it they are skipped, so this
# never fails. None of the services is used as such: the tests start their own.
set -uo pipefail
packages=(slurmctld slurmd slurm-client munge iproute2 procps shellcheck)
programs=(slurmctld slurmd srun munged ip ps shellcheck)
PATH=$PATH:/usr/sbin:/sbin

missing=()
for program in "${programs[@]}"; do
  command -v "$program" >/dev/null || missing+=("$program")
done
[ "${#missing[@]}" -gt 0 ] || exit 0

# $1: why not
skip() {
  echo "cluster tests will be skipped, ${missing[*]} missing: $1; install the Debian packages ${packages[*]}" >&2
  exit 0
}
[ "$(id -u)" = 0 ] || skip 'only root installs packages'
command -v apt-get >/dev/null || skip 'there is no apt-get'

echo "installing ${packages[*]} (13 MB) for the cluster tests ..."
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
apt_get() { apt-get -q -o DPkg::Lock::Timeout=120 -o Acquire::http::Timeout=20 "$@" >"$log" 2>&1; }
apt_get update || apt_get update || skip "apt-get update: $(tail -n 1 "$log")"
apt_get install --yes --no-install-recommends "${packages[@]}" || skip "apt-get install: $(tail -n 1 "$log")"
