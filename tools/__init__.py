"""What stands around a run: preparing, sampling, evaluating, comparing."""

import pretrain  # noqa: F401  (its settings of the environment come before torch)
