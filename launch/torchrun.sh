#!/usr/bin/env bash
# Train on this machine, one process for each GPU:  bash launch/torchrun.sh [--dry-run] CONFIG.yaml [--section.key value ...]
# Exit codes are those of python -m pretrain. Logs of all ranks: runs/NAME/launches/, the first rank's on the console.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
exec "$LAUNCH_PYTHON" -m launch local "$@"
