"""Where a training step's time goes, by family of operation, from torch's own profiler.

On a GPU the time is that of its kernels, on a CPU that of the operations themselves, without what they call. Each
belongs to the first family that it, or an operation around it, is of; what autograd runs backward belongs where its
forward did. What is left of the wall clock is "between operations": Python, launches, and waiting.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._C._autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from models.norms import NORMS
from pretrain.config import RunConfig
from pretrain.counts import derive_counts
from pretrain.data import Loader, RankBatch
from pretrain.distributed import World
from pretrain.planning.sizes import measure as measure_sizes
from pretrain.telemetry import flops_per_token
from tools.benching.machine import matmul_rate
from tools.benching.ours import OurSteps
from tools.benching.report import Row, Table
from tools.benching.timing import repeated, timed

BETWEEN, OTHER = "between operations", "other"
_RANGE = "bench: "  # before the family's name, of what is marked by hand
_FAMILIES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("data", re.compile(rf"{_RANGE}data|Memcpy HtoD")),
    ("optimizer", re.compile(rf"{_RANGE}optimizer|Optimizer\.step")),
    # The head's product with it: models/loss.py forms both at once.
    ("loss", re.compile(rf"{_RANGE}loss|_ChunkedCrossEntropy|cross_entropy|nll_loss")),
    ("attention", re.compile(r"scaled_dot_product|flash|fmha|flex_attention|sdpa")),
    ("norm", re.compile(rf"{_RANGE}norm|rms_norm|layer_norm|RMSNorm|dyt|fused.*(rsqrt|tanh|erf)")),
    ("matmul", re.compile(r"aten::(mm|addmm|bmm|baddbmm|matmul|linear|_scaled_mm)$|gemm|cutlass|nvjet|mkl_packed")),
)
FAMILIES = ("matmul", "attention", "norm", "optimizer", "loss", "data", OTHER, BETWEEN)


class Event(NamedTuple):
    """Of the profile: seconds of its own, its name and those of what is around it from inside out, and the number that
    autograd gives a forward operation and its backward alike (-1: none)."""

    seconds: float
    names: tuple[str, ...]
    sequence: int
    is_backward: bool


class Profile(NamedTuple):
    """Seconds of a step: by the wall clock, as it is profiled and without; by family, their sum is the first."""

    profiled: float
    plain: float
    families: dict[str, float]


def measure(config: RunConfig, world: World, steps: int, warmup: int = 3) -> Profile:
    """Of ``steps`` steps after ``warmup`` others."""
    cuda = world.device.type == "cuda"
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):  # compiled CPU code shows itself
        training = OurSteps(config, world)
        try:
            for _ in range(warmup):
                training.step()
            plain = timed(repeated(training.step, steps), world.device)
            _mark(training, config.train.compile)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
            with profile(activities=activities) as profiler:
                total = timed(repeated(training.step, steps), world.device)
        finally:
            training.close()
    events = list(_events(profiler.events(), cuda))
    return Profile(total / steps, plain / steps, by_family(events, total, steps))


def by_family(events: Sequence[Event], total: float, steps: int) -> dict[str, float]:
    """Seconds of a step by FAMILIES; ``total`` seconds of all steps by the wall clock, which their sum is."""
    forward = {e.sequence: family_of(e.names) for e in events if e.sequence >= 0 and not e.is_backward}
    found: dict[str, float] = defaultdict(float)
    for event in events:
        family = family_of(event.names)
        if family == OTHER and event.is_backward:
            family = forward.get(event.sequence, OTHER)
        found[family] += event.seconds
    # Kernels may overlap each other, and the loader's thread the step: there is then nothing between operations.
    busy = sum(found.values())
    scale = min(1.0, total / busy) if busy else 1.0
    shares = {name: found[name] * scale / steps for name in FAMILIES if name != BETWEEN}
    return shares | {BETWEEN: (total - busy * scale) / steps}


def family_of(names: Sequence[str]) -> str:
    """Of an operation with the names of what is around it: a mark or a range decides before the operation itself."""
    for family, pattern in _FAMILIES:
        if any(pattern.search(name) for name in names):
            return family
    return OTHER


def limits(config: RunConfig, device: torch.device) -> dict[str, float]:
    """Seconds of a step in which matrix products at their measured rate do the work of a family (telemetry/flops.py).

    The loss has the head's product in it. What activation checkpointing computes again is no work.
    """
    model, counts = config.model, derive_counts(config, 1)
    head = model.vocabulary * model.width
    products = {
        "matmul": 6 * (measure_sizes(model, 1).matmul - head),
        "loss": 6 * head,
        "attention": flops_per_token(0, model.depth, model.width, counts.sequence_length),
    }
    rate = matmul_rate(device, config.precision.compute)
    return {family: flops * counts.batch_tokens / rate for family, flops in products.items()}


def table(found: Profile, limits: Mapping[str, float]) -> Table:
    """Milliseconds of a step, the dearest family first."""
    order = sorted(found.families, key=lambda name: -found.families[name])
    rows = [
        Row(
            name,
            [1e3 * found.families[name]],
            1e3 * limits[name] if name in limits else None,
            {"share": f"{100 * found.families[name] / found.profiled:.1f} %"},
        )
        for name in order
    ]
    return Table("Where a step's time goes", "ms", rows, is_cost=True)


def _events(events: Sequence[FunctionEvent], cuda: bool) -> Iterator[Event]:
    attached: Counter[str] = Counter()
    ranges = {event.name for event in events if event.is_user_annotation}
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        names, sequence, backward = list[str](), -1, False
        place: FunctionEvent | None = event
        while place is not None:
            names.append(place.name)
            sequence = place.sequence_nr if sequence < 0 else sequence
            backward |= place.name.startswith("autograd::engine::evaluate_function")
            place = place.cpu_parent
        if not cuda:
            yield Event(event.self_cpu_time_total / 1e6, tuple(names), sequence, backward)
            continue
        for kernel in event.kernels:
            if kernel.name not in ranges:  # which are shown on the device too
                attached[kernel.name] += 1
                yield Event(kernel.duration / 1e6, (kernel.name, *names), sequence, backward)
    for event in events:  # kernels that no operation of torch's launched
        if cuda and event.device_type == DeviceType.CUDA and event.name not in ranges:
            attached[event.name] -= 1
            if attached[event.name] < 0:
                yield Event(event.time_range.elapsed_us() / 1e6, (event.name,), -1, False)


class _Marked:
    """An iterator whose items' making is a range of the profile."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __next__(self) -> RankBatch:
        with record_function(f"{_RANGE}data"):
            return next(self._loader)

    def close(self) -> None:
        self._loader.close()


def _mark(training: OurSteps, compiled: bool) -> None:
    """Ranges of the profile around the batch, the update and, where no compiler would stumble over them, the norms."""
    training.loader = _Marked(training.loader)  # type: ignore[assignment]
    update = training.engine.step

    def marked_update(lr: float) -> Tensor:
        with record_function(f"{_RANGE}optimizer"):
            return update(lr)

    training.engine.step = marked_update  # type: ignore[method-assign]
    if compiled:
        return
    for module in training.engine.model.modules():
        if isinstance(module, tuple(NORMS.values())):
            _mark_norm(module)


def _mark_norm(module: nn.Module) -> None:
    open_ranges: list[record_function] = []

    def enter(*_: Any) -> None:
        open_ranges.append(record_function(f"{_RANGE}norm"))
        open_ranges[-1].__enter__()

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(lambda *_: open_ranges.pop().__exit__(None, None, None))
