"""One step's gradients and updates, weight by weight: how heavy their tails are, how far they move, how noisy they are.

Everything stays on the device and on its rank until ``results`` adds the ranks' shares up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models import parameter_roles
from models.initialization import own_rows
from models.loss import IGNORE
from pretrain.batch import Batch
from pretrain.distributed import World
from pretrain.engines.float8 import plain
from pretrain.engines.protocol import Engine
from pretrain.telemetry.noise import noise_scale
from pretrain.telemetry.statistics import kurtosis, moments, stride, tail

WEIGHTS = ("matrix", "embedding", "head")  # the roles of tensors large enough to have a distribution


class StepWatch:
    """Looks on while ``pretrain.step.train_step`` takes one step, and changes nothing in it.

    ``kinds``, of log.inspect: gradients, updates, noise. Parameters may be plain or DTensors sharded along their first
    axis, with shards that are empty. Ranks that replicate a shard count it as often as there are replicas, which none
    of the figures notices: all are quotients, or free of scale. For ``noise`` every gradient must be reduced over the
    ranks after each micro-batch (engines/combinations.py), and there must be two of these at least.
    """

    def __init__(self, engine: Engine, world: World, kinds: Collection[str]) -> None:
        self._engine, self._world, self._kinds = engine, world, kinds
        self._parameters = dict(engine.model.named_parameters())
        roles = parameter_roles(engine.model)
        self._weights = {name: p for name, p in self._parameters.items() if roles[name] in WEIGHTS}
        self._sums: dict[str, Tensor] = {}  # fp64, to be added up over the ranks
        self._samples: dict[str, Tensor] = {}  # fp32, likewise
        self._targets = torch.zeros((), dtype=torch.float64, device=world.device)  # of this rank, so far
        self._before: list[Tensor] = []  # copies of what it holds of the parameters, while they move

    @torch.no_grad()
    def accumulated(self, batch: Batch, first: bool, last: bool) -> None:
        """The backward of a micro-batch is done: the step's first, or its last, or both or neither."""
        if "noise" in self._kinds:
            self._targets += batch.targets.ne(IGNORE).sum()
            for key, due in (("first", first), ("last", last)):
                if due:
                    self._sums[key] = torch.stack([self._squared_norm(), self._targets])
        if last and "gradients" in self._kinds:
            for name, parameter in self._weights.items():
                gradient = _local(parameter.grad)
                self._sums[f"moments/{name}"] = moments(gradient)
                self._samples[name] = _placed_sample(parameter, gradient)
        if last and "updates" in self._kinds:
            self._before = [local.clone() for local in self._local_parameters()]

    @torch.no_grad()
    def updated(self) -> None:
        """The optimizer has moved the parameters, or left the step out."""
        if "updates" not in self._kinds:
            return
        sizes = torch._foreach_norm(self._before)
        torch._foreach_sub_(self._before, list(self._local_parameters()))
        for name, size, change in zip(self._parameters, sizes, torch._foreach_norm(self._before), strict=True):
            self._sums[f"update/{name}"] = torch.stack([change, size]).double().square()
        self._before = []

    def results(self) -> dict[str, Tensor]:
        """Each figure by its key, on the device of the world. Collective: two all-reduces.

        ``grad_kurtosis/NAME``, ``grad_hill/NAME`` and ``grad_q999_q50/NAME`` of each of ``WEIGHTS``, before clipping;
        ``update_ratio/NAME`` of every parameter, |change| / |value before|, weight decay included; ``noise_scale`` and
        what it is made of, of all ``WEIGHTS`` together (noise.py).
        """
        device = self._world.device
        sums, samples = _added(self._sums, self._world), _added(self._samples, self._world)
        found: dict[str, Tensor] = {}
        for name, sampled in samples.items():
            heavy = tail(sampled)
            found[f"grad_kurtosis/{name}"] = kurtosis(sums[f"moments/{name}"])
            found[f"grad_hill/{name}"] = heavy.hill
            found[f"grad_q999_q50/{name}"] = heavy.ratio
        if "updates" in self._kinds:
            left_out = getattr(self._engine.optimizer, "found_inf", None)  # a step that was none has no ratio
            for name in self._parameters:
                change, size = sums[f"update/{name}"]
                ratio = (change / size).sqrt()
                if left_out is not None:
                    ratio = torch.where(left_out.to(device).bool(), torch.nan, ratio)
                found[f"update_ratio/{name}"] = ratio
        if "noise" in self._kinds:
            (part, some), (whole, total) = sums["first"], sums["last"]
            # The gradient so far is a sum over its targets divided by the number of the step's; of the mean it is less.
            noise = noise_scale(part * (total / some) ** 2, some, whole, total)
            found["noise_gradient_squared"] = noise.gradient_squared
            found["noise_covariance_trace"] = noise.covariance_trace
            found["noise_scale"] = noise.scale
        return found

    def _squared_norm(self) -> Tensor:
        """Of this rank's share of all weights' gradients, fp64 []."""
        norms = torch._foreach_norm([_local(parameter.grad) for parameter in self._weights.values()])
        return torch.stack([norm.to(self._world.device) for norm in norms]).double().square().sum()

    def _local_parameters(self) -> Iterator[Tensor]:
        return (_local(parameter) for parameter in self._parameters.values())


def _local(tensor: Tensor | None) -> Tensor:
    """What this rank holds."""
    assert tensor is not None, "every parameter is trained"
    held = plain(tensor)
    return cast(Tensor, held.to_local() if isinstance(held, DTensor) else held)


def _placed_sample(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """This rank's part of the sample that one process would draw from the whole gradient, fp32, elsewhere 0: added up
    over the ranks it is that sample, whatever the number of them."""
    step, row = stride(parameter.shape), parameter.shape[1:].numel()
    sampled = torch.zeros(-(-parameter.numel() // step), device=gradient.device)
    begin = own_rows(parameter).start * row
    first = -begin % step
    own = gradient.reshape(-1)[first::step]
    place = (begin + first) // step
    sampled[place : place + own.numel()] = own.float().abs()
    return sampled


def _added(tensors: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """The sums over all ranks, by one all-reduce."""
    if not tensors:
        return {}
    flat = world.sum(torch.cat([tensor.to(world.device).reshape(-1) for tensor in tensors.values()]))
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {key: part.view_as(own) for (key, own), part in zip(tensors.items(), parts, strict=True)}
