"""What ``log.inspect`` asks for, every ``log.inspect_every`` steps: the inside of the model in numbers.

Half of it is seen in one extra forward of one sequence without gradients, the rest while a step is taken
(step_watch.py). Neither changes what is trained, bit for bit. Between the steps inspected nothing is left in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TypeVar

from torch import Tensor, nn

from pretrain.batch import Batch, make_batch
from pretrain.config import INSPECTED, RunConfig
from pretrain.counts import Counts
from pretrain.distributed import World
from pretrain.engines.combinations import uninspectable
from pretrain.engines.protocol import Engine
from pretrain.telemetry.activations import record_outliers
from pretrain.telemetry.attention import record_attention
from pretrain.telemetry.sites import numbers, record_saturation, record_sites, scalars
from pretrain.telemetry.step_watch import StepWatch

T = TypeVar("T")

_FORWARD = ("alpha", "saturation", "outliers", "attention")
_SEQUENCES = 1  # of each rank; rank 0, which writes, has the batch's first one under every world size


class Inspection:
    """Which steps are inspected, and what is found there. ``eos`` ends documents, as in pretrain/batch.py."""

    def __init__(self, config: RunConfig, counts: Counts, engine: Engine, world: World, eos: int) -> None:
        self._engine, self._world, self._eos = engine, world, eos
        self._masked = config.data.document_mask
        self._micro_batch = counts.micro_batch
        self._every = config.log.inspect_every
        wanted = [kind for kind in INSPECTED if config.log.inspect is None or kind in config.log.inspect]
        missing = uninspectable(config, world)
        if counts.accumulation == 1:
            missing.setdefault("noise", "train.micro_batch is the whole batch, and two sizes are needed")
        self._missing = {kind: why for kind, why in missing.items() if kind in wanted}
        self._kinds = [kind for kind in wanted if kind not in missing]

    def describe(self) -> list[str]:
        """For the start of a run: what is inspected, and what cannot be, with its reason. Nothing if nothing is."""
        if not self._every:
            return []
        lines = [f"every {self._every} steps inspected: {', '.join(self._kinds) or 'nothing'}"]
        return lines + [f"log.inspect {kind} is left out: {why}" for kind, why in self._missing.items()]

    def of_step(self, step: int) -> StepWatch | None:
        """What looks on at step ``step`` (from 1), the same on all ranks; None if the step is not inspected."""
        if not self._every or step % self._every:
            return None
        return StepWatch(self._engine, self._world, self._kinds)

    def read(self, watch: StepWatch, rows: Tensor) -> dict[str, float]:
        """After the step that ``watch`` saw: all figures by their keys, in one transfer; empty on ranks but 0.

        ``rows`` int64 [sequences, length + 1] are this rank's of the step. Collective.
        """
        found = watch.results()
        if any(kind in _FORWARD for kind in self._kinds):
            found = self._engine.observe(self._batch(rows[:_SEQUENCES]), self._record) | found
        return numbers(found) if self._world.is_main else {}

    def alphas(self, rows: Tensor) -> dict[str, float]:
        """``alpha/NAME`` and ``inverse_std/NAME`` on the first micro-batch of ``rows``. Collective."""
        return scalars(self._engine.observe(self._batch(rows[: self._micro_batch]), record_sites))

    def _batch(self, rows: Tensor) -> Batch:
        return make_batch(rows.to(self._world.device), self._eos, self._masked)

    @contextmanager
    def _record(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """What the forward passes inside the ``with`` show, by key; filled when it is left."""
        found: dict[str, Tensor] = {}
        with ExitStack() as stack:
            sites = self._enter(stack, "alpha", record_sites(model))
            saturated = self._enter(stack, "saturation", record_saturation(model))
            outliers = self._enter(stack, "outliers", record_outliers(model))
            entropies = self._enter(stack, "attention", record_attention(model))
            yield found
        for name, site in sites.items():
            found |= {f"alpha/{name}": site.alpha, f"inverse_std/{name}": site.inverse_std}
        found |= {f"saturated/{name}": share for name, share in saturated.items()}
        for name, one in outliers.items():
            found[f"outliers_over_6/{name}"] = one.over
            found[f"outliers_kurtosis/{name}"] = one.kurtosis
            found[f"outliers_max_median/{name}"] = one.ratio
        found |= {f"attention_entropy/{name}": entropy.mean() for name, entropy in entropies.items()}

    def _enter(self, stack: ExitStack, kind: str, recorder: AbstractContextManager[dict[str, T]]) -> dict[str, T]:
        """What the recorder fills, if its kind is wanted."""
        return stack.enter_context(recorder) if kind in self._kinds else {}
