# shellcheck shell=bash
# Sourced by the scripts beside it: what this site needs (site.env), and how Python is called.

LAUNCH_CODE=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
LAUNCH_SITE=${LAUNCH_SITE:-$LAUNCH_CODE/launch/site.env}
if [[ -e $LAUNCH_SITE ]]; then
  # shellcheck source=launch/site.example.env
  source "$LAUNCH_SITE"
fi

if [[ -z ${LAUNCH_PYTHON:-} ]]; then
  if [[ -x $PWD/.venv/bin/python ]]; then
    LAUNCH_PYTHON=$PWD/.venv/bin/python
  elif [[ -x $LAUNCH_CODE/.venv/bin/python ]]; then
    LAUNCH_PYTHON=$LAUNCH_CODE/.venv/bin/python
  else
    LAUNCH_PYTHON=python3
  fi
fi

# Our code from where these scripts are, which is a frozen copy in a job, never from the working directory.
export PYTHONPATH=$LAUNCH_CODE${PYTHONPATH:+:$PYTHONPATH} PYTHONSAFEPATH=1 PYTHONDONTWRITEBYTECODE=1

# Compiled kernels on the node's own disk: on a shared one, nodes that write the same file disturb each other. They stay
# there for the next job of this user.
LAUNCH_CACHE=${LAUNCH_LOCAL_DISK:-${TMPDIR:-/tmp}}/equipoise-$(id -u)
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$LAUNCH_CACHE/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$LAUNCH_CACHE/inductor}
