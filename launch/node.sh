#!/usr/bin/env bash
# On every node of a job, started by train.sbatch:  node.sh COMMAND ..., of python -m launch
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$LAUNCH_PYTHON" -m launch "$@"
