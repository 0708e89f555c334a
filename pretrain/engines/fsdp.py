"""FSDP2, or one process with the plain model: the order of the calls is the documentation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models import parameter_roles
from models.errors import ConfigError
from models.initialization import initialize
from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.engines.float8 import BytewiseAllGather, is_gathered_in_float8, plain, refresh_scales
from pretrain.engines.mesh import device_mesh, shard_size
from pretrain.engines.model import ModelEngine
from pretrain.optimizers import build_optimizer, set_learning_rate

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)

# Of these every rank holds all: they are a ten-thousandth of the model, and FSDP has one dtype for a whole group of
# parameters, while these stay fp32 when matrices are gathered in bf16. Their gradients take one all-reduce a step.
REPLICATED_ROLES = ("gain", "shift", "alpha", "scale")


class FSDPEngine(ModelEngine):
    """Master weights, gradients and optimizer state in fp32, matrices sharded over the ranks block by block.

    In bf16 a block's matrices are gathered in bf16 and their gradients reduced in fp32. Embedding and head are
    gathered in fp32: the first feeds the residual stream, the second's gradient is a sum over all tokens.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        super().__init__(config, world)
        model, roles = self.model, parameter_roles(self.model)
        if world.size > 1:
            ignored = {p for name, p in model.named_parameters() if roles[name] in REPLICATED_ROLES}
            _shard(model, device_mesh(config.parallel, world), config, ignored)
        model.to_empty(device="cpu" if config.parallel.cpu_offload else world.device)
        parameters = dict(model.named_parameters())
        self._replicated: list[nn.Parameter] = []
        if world.size > 1:
            self._replicated = [p for name, p in parameters.items() if roles[name] in REPLICATED_ROLES]
            for parameter in self._replicated:  # never offloaded
                parameter.data = parameter.data.to(world.device)
        self._gathers_float8 = any(is_gathered_in_float8(p) for p in parameters.values())
        if self._gathers_float8 and world.device.type == "cpu":
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.set_custom_all_gather(cast(Any, BytewiseAllGather()))
        self.optimizer = build_optimizer(parameters, roles, config.optimizer)

    def describe(self) -> list[str]:
        parallel, size = self._config.parallel, self._world.size
        if size == 1:
            return super().describe()
        how = f"fsdp: {parallel.shard}"
        if parallel.shard == "hybrid":
            group = shard_size(parallel, self._world)
            how += f", {size // group} replicas sharded over {group} ranks each"
        return [how + (", offloaded to the CPU" if parallel.cpu_offload else ""), *super().describe()]

    def initialize(self) -> None:
        initialize(self.model, self._config.model, self._config.seed)
        self._refresh()

    def _refresh(self) -> None:
        if self._gathers_float8:
            refresh_scales(self.model)

    def accumulate(self, batch: Batch, targets: Tensor, last: bool) -> Tensor:
        if isinstance(self.model, FSDPModule):
            # Reducing only once saves communication and, but for replicated parameters, costs every rank a whole
            # model of gradients. Between replicas once is always enough.
            shard = self._config.parallel.shard
            self.model.set_requires_gradient_sync(last or shard in ("full", "hybrid"))
            self.model.set_requires_all_reduce(last)
        objective, nll = self._objective(batch, targets)
        objective.backward()
        if last:
            average_gradients(self._replicated, self._world)
        return nll

    def step(self, lr: float) -> Tensor:
        if self._config.optimizer.alpha.clip is not None:
            alphas = [p for p in self._alpha_parameters().values() if p.grad is not None]
            _clip(alphas, self._config.optimizer.alpha.clip, _total_norm(alphas))
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = _total_norm(parameters).to(self._world.device)
        if self.guard is not None:
            cast(Any, self.optimizer).found_inf = self.guard.judge(norm)
        if self._config.train.clip is not None:
            _clip(parameters, self._config.train.clip, norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._bound_alphas()
        self._refresh()
        return norm

    def tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_OPTIONS)
        return {"model": {name: plain(tensor) for name, tensor in model.items()}, "optimizer": optimizer}

    def restore(self, tensors: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=_OPTIONS,
        )
        self._refresh()


def _shard(model: nn.Module, mesh: DeviceMesh, config: RunConfig, ignored: set[nn.Parameter]) -> None:
    settings: dict[str, Any] = {
        "mesh": mesh,
        "ignored_params": ignored,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        if config.parallel.cpu_offload
        else OffloadPolicy(),
    }
    policy = MixedPrecisionPolicy()
    if config.precision.compute == "bf16":  # inputs stay as they are: the residual stream is bf16, RoPE's tables fp32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    blocks = cast(Iterable[nn.Module], model.get_submodule("blocks"))
    again = config.parallel.shard != "grad_op"
    for block in blocks:
        fully_shard(block, reshard_after_forward=again, mp_policy=policy, **settings)
    # The root's own, embedding and head, would be gathered again at once: the backward begins with them.
    root = MixedPrecisionPolicy(cast_forward_inputs=False)
    fully_shard(model, reshard_after_forward=False, mp_policy=root, **settings)
    _prefetch([cast(FSDPModule, block) for block in blocks], config.parallel.prefetch)


def _prefetch(blocks: list[FSDPModule], count: int) -> None:
    """While a block computes, the next ``count`` are gathered; FSDP itself knows only of the next one, and in the
    forward only as far as the host is ahead of the device."""
    if count < 1:
        raise ConfigError(f"parallel.prefetch is {count}: write 1 or more blocks")
    for index, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[index + 1 : index + 1 + count])
        block.set_modules_to_backward_prefetch(blocks[max(0, index - count) : index][::-1])


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Over all ranks, in place, by one all-reduce; no host synchronization."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world.size
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(own) for part, own in zip(parts, gradients, strict=True)])


def _total_norm(parameters: list[nn.Parameter]) -> Tensor:
    """The norm of all gradients together: those of each mesh, and the plain ones, make a norm of their own first."""
    kinds: dict[Any, list[Tensor]] = {}
    for gradient in (cast(Tensor, p.grad) for p in parameters):
        kinds.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [get_total_norm(group) for group in kinds.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.to(whole[0].device) for norm in whole]))


def _clip(parameters: list[nn.Parameter], largest: float, norm: Tensor) -> None:
    for kind in (True, False):
        group = [p for p in parameters if isinstance(p, DTensor) == kind]
        if group:
            clip_grads_with_norm_(group, largest, norm)
