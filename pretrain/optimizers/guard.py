"""Which steps are better left out: those whose gradient norm is out of line with the norms before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class NormGuard:
    """Decides on the device, from a window of norms; nothing in ``judge`` waits for it.

    A step is left out if its norm is not finite, or lies above mean + ``sigma`` · standard deviation of the ``window``
    norms before it; until there are as many, only the first counts. A norm above that limit enters the window as the
    limit itself: one spike does not blind the guard to the next, and a run whose norms have risen for good is let go on
    after a while. One that is not finite does not enter. The norm is the same on all ranks, and so is what is decided.
    """

    def __init__(self, sigma: float, window: int, device: torch.device) -> None:
        self._sigma = sigma
        self._norms = torch.full((window,), float("nan"), device=device)  # oldest first; nan where there is none yet
        self.left_out = torch.zeros((), dtype=torch.int64, device=device)  # steps of the whole run
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)  # of them, up to the last step

    @torch.no_grad()
    def judge(self, norm: Tensor) -> Tensor:
        """1 to leave the step out, 0 to take it: fp32 [], the ``found_inf`` of an optimizer."""
        deviation, mean = torch.std_mean(self._norms)
        limit = mean + self._sigma * deviation  # nan until the window is full, and no norm is above nan
        finite = norm.isfinite()
        leave = ~finite | (norm > limit)
        entered = self._norms.roll(-1)
        entered[-1] = torch.fmin(norm, limit)
        self._norms = torch.where(finite, entered, self._norms)
        self.left_out += leave
        self.in_a_row = (self.in_a_row + 1) * leave
        return leave.float()

    @property
    def is_stuck(self) -> bool:
        """Whether as many steps in a row as the window is long were left out; reads from the device."""
        return int(self.in_a_row) >= len(self._norms)

    def state(self) -> dict[str, Any]:
        """All that the next decision depends on, as JSON can write it bit for bit; reads from the device."""
        norms = [norm for norm in self._norms.tolist() if norm == norm]
        return {"norms": norms, "left_out": int(self.left_out), "in_a_row": int(self.in_a_row)}

    def load_state(self, state: dict[str, Any]) -> None:
        """What ``state`` returned, of a window as long."""
        self._norms.fill_(float("nan"))
        if state["norms"]:
            self._norms[-len(state["norms"]) :] = torch.tensor(state["norms"], dtype=self._norms.dtype)
        self.left_out.fill_(state["left_out"])
        self.in_a_row.fill_(state["in_a_row"])
