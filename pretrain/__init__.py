"""How it is trained: configuration, data, engines, checkpoints, telemetry and the loop around models/."""

import os

# The OpenMP of torch's CPU build spins for milliseconds at the end of every operation. Where another program has one of
# the cores, threads then wait for one that is not running: a step takes up to ten times as long. Spinning for some
# ten microseconds costs nothing where the cores are free (docs/results.md). Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
