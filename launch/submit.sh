#!/usr/bin/env bash
# Freeze code and configuration now, and submit a job that runs them:
#
#   bash launch/submit.sh [--dry-run] [options of sbatch] -- CONFIG.yaml [--section.key value ...]
#
# From the checkout's folder. The job's own output goes to the run's folder.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

dry=''
if [[ ${1:-} == --dry-run ]]; then
  dry=1
  shift
fi
options=()
while [[ $# -gt 0 && $1 != -- ]]; do
  options+=("$1")
  shift
done
if [[ $# -lt 2 ]]; then
  echo "error: write bash launch/submit.sh [options of sbatch] -- CONFIG.yaml [--section.key value ...]" >&2
  exit 2
fi
shift

frozen=$("$LAUNCH_PYTHON" -m launch freeze ${dry:+--dry-run} "$@")
run=${frozen%/frozen/*}
output=${run//%/%%} # sbatch fills in what follows one percent sign
defaults=("--job-name=${run##*/}" "--output=$output/slurm-%j.out")
command=(sbatch "${defaults[@]}" "${options[@]}" "$frozen/code/launch/train.sbatch" --frozen "$frozen")
if [[ -n $dry ]]; then
  printf '%q ' "${command[@]}"
  printf '\n'
  exit 0
fi
exec "${command[@]}"
