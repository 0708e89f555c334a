"""FSDP2, or one process with the plain model: the order of the calls is the documentation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from models import Transformer, parameter_roles
from models.initialization import initialize, measure_alpha
from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.engines.compiling import compile_blocks, require_compiler
from pretrain.optimizers import build_optimizer, set_learning_rate

_OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


class FSDPEngine:
    """Parameters, gradients and optimizer state in fp32, sharded over all ranks; matrix products in the compute
    dtype by autocast, so that gains and alphas meet fp32 arithmetic whatever the precision."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config = config
        self._world = world
        with torch.device("meta"):
            model = Transformer(config.model)
        if config.train.compile:
            compile_blocks(model.blocks, world.device)
        elif config.data.document_mask and world.device.type == "cuda":
            require_compiler(world.device)  # FlexAttention is compiled in any case
        if world.size > 1:
            mesh = init_device_mesh(world.device.type, (world.size,))
            again = config.parallel.shard == "full"
            for block in model.blocks:
                fully_shard(block, mesh=mesh, reshard_after_forward=again)
            # The root's own, embedding and head, would be gathered again at once: the backward begins with them.
            fully_shard(model, mesh=mesh, reshard_after_forward=False)
        model.to_empty(device=world.device)
        self.model: nn.Module = model
        self.optimizer = build_optimizer(dict(model.named_parameters()), parameter_roles(model), config.optimizer)

    def _compute(self) -> AbstractContextManager[None]:
        bf16 = self._config.precision.compute == "bf16"
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=bf16)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        train = self._config.train
        with self._compute():
            return self.model(batch.inputs, batch.targets, batch.documents, train.z_loss, train.loss_chunk)

    def initialize(self) -> None:
        initialize(self.model, self._config.model, self._config.seed)

    def accumulate(self, batch: Batch, targets: Tensor, last: bool) -> Tensor:
        sharded = isinstance(self.model, FSDPModule)
        if sharded:
            # Reducing only once saves communication and costs every rank a whole model of gradients.
            once = self._config.parallel.shard == "grad_op"
            cast(FSDPModule, self.model).set_requires_gradient_sync(last or not once)
        objective, nll = self._loss(batch)
        # FSDP averages gradients over the ranks; the objective is a sum over all of them.
        (objective * (self._world.size / targets)).backward()
        return nll

    def step(self, lr: float) -> Tensor:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self._config.train.clip is not None:
            clip_grads_with_norm_(parameters, self._config.train.clip, norm)
        set_learning_rate(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Tensor:
        self.model.eval()
        nll = self._loss(batch)[1]
        self.model.train()
        return nll

    def measure_alpha(self, batch: Batch, target: float) -> dict[str, float]:
        return measure_alpha(self.model, lambda: self.evaluate(batch), target)

    def observe(self, batch: Batch, watch: Callable[[nn.Module], Any]) -> Any:
        with watch(self.model) as seen:
            self.evaluate(batch)
        return seen

    def tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer, options=_OPTIONS)
        return {"model": model, "optimizer": optimizer}

    def restore(self, tensors: dict[str, Any]) -> None:
        set_state_dict(
            self.model,
            self.optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
            options=_OPTIONS,
        )
