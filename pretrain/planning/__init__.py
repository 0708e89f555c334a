"""What a run would need and how fast it would be, worked out without a GPU: `python -m tools.plan`."""

from pretrain.planning.cluster import Cluster, cluster_of
from pretrain.planning.plan import Plan, make_plan
from pretrain.planning.remedies import Change, Remedy, find_remedy, largest_micro_batch

__all__ = ["Change", "Cluster", "Plan", "Remedy", "cluster_of", "find_remedy", "largest_micro_batch", "make_plan"]
