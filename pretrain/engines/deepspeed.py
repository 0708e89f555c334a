"""DeepSpeed's ZeRO behind the protocol: its sharding and its collectives; our optimizers, schedule and checkpoints."""

from __future__ import annotations

import importlib
import logging
import math
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from models import parameter_roles
from models.errors import ConfigError
from models.initialization import first_rows
from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.counts import Counts, derive_counts
from pretrain.distributed import World, group_of_one
from pretrain.engines.model import ModelEngine
from pretrain.engines.zero_state import ZeroState, elements, write_partition
from pretrain.optimizers import build_optimizer, set_learning_rate

_BUCKET = 50_000_000  # elements that one collective carries, 200 MB in fp32: DeepSpeed's 5e8 takes 2 GB of every rank


def deepspeed_config(config: RunConfig, counts: Counts) -> dict[str, Any]:
    """DeepSpeed's configuration, derived: nothing in it is set by hand.

    bf16 is DeepSpeed's torch_autocast over fp32 weights with no module in its "lower precision" list, so that alphas,
    gains, and gradients on their way between ranks stay fp32; its bf16 section would make the first two bf16.
    """
    parallel, stage = config.parallel, config.parallel.zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": _BUCKET,
        "allgather_bucket_size": _BUCKET,
        "overlap_comm": stage > 0,
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _BUCKET,
            "stage3_max_live_parameters": 10 * _BUCKET,
            "sub_group_size": 10**12,  # one optimizer step a group: bounds only memory that CPU offloading would need
        }
    if parallel.cpu_offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": counts.sequences,
        "train_micro_batch_size_per_gpu": counts.micro_batch,
        "gradient_accumulation_steps": counts.accumulation,
        "gradient_clipping": config.train.clip or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,  # its list knows Adam; tests/pretrain/test_engine_parity.py tests ours
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": config.precision.compute == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 10**12,
    }


class DeepSpeedEngine(ModelEngine):
    """Weights, gradients and optimizer state in fp32, shared among all ranks as ``parallel.zero_stage`` says."""

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        deepspeed = import_deepspeed(world)
        group_of_one(world)
        deepspeed.init_distributed("nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False)
        self.settings = deepspeed_config(config, derive_counts(config, world.size))
        self._roles = parameter_roles(self.model)
        self._stage = config.parallel.zero_stage
        if self._stage == 3:
            _materialize_in_partitions(self.model, world.device, self.settings)
        else:
            self.model.to_empty(device=world.device)
            for parameter in self.model.parameters():  # _make_state has to find numbers
                parameter.detach().zero_()
        self.optimizer = build_optimizer(dict(self.model.named_parameters()), self._roles, config.optimizer)
        self._deepspeed, *_ = deepspeed.initialize(
            model=self.model, optimizer=self.optimizer, config=self.settings, dist_init_required=False
        )
        self._forward = self._deepspeed
        self._state = ZeroState(self.model, self.optimizer, self._deepspeed.optimizer, self._stage)
        self._left_out = False
        self._has_state = False  # optimizers make theirs in the first step

    def describe(self) -> list[str]:
        offload = ", optimizer state on the CPU" if self._config.parallel.cpu_offload else ""
        return [f"deepspeed: ZeRO stage {self._stage}{offload}", *super().describe()]

    def compute(self) -> AbstractContextManager[None]:
        return nullcontext()  # DeepSpeed's forward has the autocast

    def initialize(self) -> None:
        for name, parameter in self.model.named_parameters():
            self._set_first_value(name, parameter)

    def _set_first_value(self, name: str, parameter: nn.Parameter) -> None:
        shape, seed = self.shapes[name], self._config.seed
        if self._stage < 3 or math.prod(shape) == parameter.numel():  # whole here, or small and kept gathered
            rows = range(shape[0])
            self._state.set_parameter(name, first_rows(name, self._roles[name], shape, rows, self._config.model, seed))
            return
        mine, width = elements(parameter, self._world.rank), math.prod(shape[1:])
        rows = range(mine.start // width, -(-mine.stop // width))
        drawn = first_rows(name, self._roles[name], shape, rows, self._config.model, seed).flatten()
        write_partition(parameter, drawn[mine.start - rows.start * width :][: len(mine)])

    def accumulate(self, batch: Batch, targets: Tensor, last: bool) -> Tensor:
        self._deepspeed.set_gradient_accumulation_boundary(last)
        objective, nll = self._objective(batch, targets)
        self._deepspeed.backward(objective, scale_wrt_gas=False)
        return nll.detach()

    def step(self, lr: float) -> Tensor:
        self._has_state = True
        set_learning_rate(self.optimizer, lr)
        if self._stage == 0:
            return self._step_whole()
        self._deepspeed.step()
        self._bound_alphas()
        norm = self._deepspeed.get_global_grad_norm()
        # DeepSpeed leaves out an update with gradients that are not finite, and goes on. Another engine's weights would
        # be ruined and the run would end when metrics are read; so it does here.
        self._left_out |= bool(getattr(self._deepspeed.optimizer, "overflow", False))
        told = math.inf if self._left_out else norm
        return torch.as_tensor(told, dtype=torch.float32, device=self._world.device).detach()

    def _step_whole(self) -> Tensor:
        """Of stage 0, where gradients are whole on every rank and DeepSpeed clips without telling the norm."""
        if self._config.optimizer.alpha.clip is not None:
            clip_grad_norm_(self._alpha_parameters().values(), self._config.optimizer.alpha.clip)
        norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.guard is not None:
            cast(Any, self.optimizer).found_inf = self.guard.judge(norm)
        self._deepspeed.step()
        self._bound_alphas()
        return norm

    def _alphas(self) -> list[Tensor]:
        return [tensor for p in self._alpha_parameters().values() for tensor in self._state.copies(p)]

    def measure_alpha(self, batch: Batch, target: float) -> dict[str, float]:
        measured = super().measure_alpha(batch, target)
        for site, alpha in measured.items():
            self._state.set_parameter(f"{site}.alpha", torch.full((1,), alpha))
        return measured

    def tensors(self) -> dict[str, Any]:
        if not self._has_state:
            self._make_state()
        return self._state.read()

    def restore(self, tensors: dict[str, Any]) -> None:
        self._state.write(tensors)
        self._left_out = False

    def _make_state(self) -> None:
        """One step of a zero gradient at learning rate 0 makes the optimizer's state, and moves nothing."""
        counts = derive_counts(self._config, self._world.size)
        tokens = torch.zeros(counts.micro_batch, counts.sequence_length, dtype=torch.int64, device=self._world.device)
        devices = [self._world.device] if self._world.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            self.accumulate(Batch(tokens, tokens, None), torch.full((), math.inf, device=self._world.device), last=True)
        guard, self.guard = self.guard, None  # a norm of 0 is none to compare with
        self.step(0.0)
        self.guard = guard
        for counter in self._state.counters():
            counter.zero_()


def import_deepspeed(world: World) -> Any:
    """The package, quiet and without builds; ConfigError if it is not here."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # while it is imported, too
    try:
        deepspeed: Any = importlib.import_module("deepspeed")
    except ImportError:
        raise ConfigError(
            "parallel.engine deepspeed needs DeepSpeed, which is not here: pip install deepspeed, or write "
            "--parallel.engine fsdp"
        ) from None
    # Its progress goes to standard output, which is ours, and its warning of an untested optimizer is about ours.
    deepspeed.utils.logger.setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # on a CPU it would build C++ for a minute
    return deepspeed


def _materialize_in_partitions(model: nn.Module, device: torch.device, settings: dict[str, Any]) -> None:
    """Give a model on the meta device storage module by module, each partitioned before the next exists."""
    import deepspeed

    for module in reversed(list(model.modules())):  # children come before what holds them
        own = list(module.named_parameters(recurse=False))
        for name, parameter in own:
            module.register_parameter(name, nn.Parameter(torch.zeros_like(parameter, device=device)))
        if own:
            deepspeed.zero.Init(module=module, mem_efficient_linear=False, config_dict_or_path=settings)
    for module in model.modules():  # read outside their own forward: models/loss.py
        for weight in (getattr(module, "head", None), getattr(module, "embedding", None)):
            if weight is not None:
                deepspeed.zero.register_external_parameter(module, weight.weight)
