"""How a run is started: on this machine, on the nodes of a SLURM job, again after it was stopped."""
