"""What every engine does with the model alike: prepares it, passes it batches, looks into it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models import Transformer, parameter_roles
from models.initialization import measure_alpha
from pretrain.batch import Batch
from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.engines.combinations import refuse_impossible, unheeded
from pretrain.engines.compiling import compile_blocks, require_compiler
from pretrain.engines.float8 import convert_linears
from pretrain.engines.float8_bound import bound_inputs
from pretrain.engines.fusing import fuse_kernels
from pretrain.engines.mesh import shard_size
from pretrain.engines.recomputation import checkpoint_activations
from pretrain.optimizers import NormGuard, alphas


class ModelEngine:
    """The model on the meta device, its linears, blocks and compilation as configured; sharding comes after.

    ``model`` has the canonical names; ``_forward`` is what a batch goes through, the model or its wrapper.
    """

    def __init__(self, config: RunConfig, world: World) -> None:
        refuse_impossible(config, world)
        self._config = config
        self._world = world
        with torch.device("meta"):
            self.model: nn.Module = Transformer(config.model)
        self.shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        blocks = self.model.get_submodule("blocks")
        assert isinstance(blocks, nn.ModuleList)
        sharded = config.parallel.engine == "fsdp" and world.size > 1
        group = shard_size(config.parallel, world) if sharded else 0
        gathering = 0 if config.parallel.cpu_offload else group
        self._float8 = convert_linears(self.model, config.precision, world.device, gathering)
        bound = self._float8 and config.precision.fp8_input_scale == "bound"
        self._bounded = bound_inputs(self.model, self._float8) if bound else []
        self._kernels = fuse_kernels(self.model, config.train.kernels, world.device)
        checkpoint_activations(blocks, config.train)
        if config.train.compile:
            compile_blocks(blocks, world.device, config.train.cuda_graphs)
        elif config.data.document_mask and world.device.type == "cuda":
            require_compiler(world.device)  # FlexAttention is compiled in any case
        self.settings: dict[str, Any] = {}
        self.guard: NormGuard | None = None
        if config.train.skip_norm_sigma is not None:
            self.guard = NormGuard(config.train.skip_norm_sigma, config.train.skip_window, world.device)
        self._forward: Callable[..., Any] = self.model

    def describe(self) -> list[str]:
        """What the settings amount to, for the start of a run: a line each."""
        float8 = describe_float8(self._config.precision.fp8, self._float8, self._bounded, self._world.device)
        return [*self._kernels, *float8, *unheeded(self._config, self._world)]

    def scale_alphas(self, factor: float) -> None:
        """Multiply every alpha, and keep it within ``optimizer.alpha.bounds``; no host synchronization."""
        alphas.scale(self._alphas(), factor, self._config.optimizer.alpha.bounds)

    def _bound_alphas(self) -> None:
        """After an update."""
        bounds = self._config.optimizer.alpha.bounds
        if bounds is not None:
            alphas.keep_within(self._alphas(), bounds)

    def _alpha_parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if name in self._alpha_names}

    @cached_property
    def _alpha_names(self) -> frozenset[str]:
        """Found once: steps ask for them."""
        return frozenset(name for name, role in parameter_roles(self.model).items() if role == "alpha")

    def _alphas(self) -> list[Tensor]:
        """Every tensor of this rank that holds alphas, or parts of them."""
        return [p.to_local() if isinstance(p, DTensor) else p for p in self._alpha_parameters().values()]

    def compute(self) -> AbstractContextManager[None]:
        """Matrix products in the compute dtype by autocast, so that gains and alphas meet fp32 arithmetic."""
        bf16 = self._config.precision.compute == "bf16"
        # Without a cache: it would hold a bf16 copy of every weight to the end of the forward, to be used once.
        return torch.autocast(self._world.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        train = self._config.train
        if train.cuda_graphs:  # what the last pass left in the graphs' memory has been read
            torch.compiler.cudagraph_mark_step_begin()
        with self.compute():
            return self._forward(batch.inputs, batch.targets, batch.documents, train.z_loss, train.loss_chunk)

    def _objective(self, batch: Batch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """What the backward starts from, and the negative log-likelihood. Engines average gradients over the ranks;
        the objective is a sum over all of them."""
        objective, nll = self._loss(batch)
        return objective * (self._world.size / targets), nll

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


def describe_float8(recipe: str, names: list[str], bounded: list[str], device: torch.device) -> list[str]:
    """Which linears run in 8 bits: for each kind of linear, in which blocks."""
    if not names:
        return []
    kinds: dict[str, list[int]] = {}
    for name in names:
        _, index, kind = name.split(".", 2)
        kinds.setdefault(kind, []).append(int(index))
    emulated = ", emulated" if device.type == "cpu" else ""
    lines = [f"fp8 ({recipe}{emulated}): {len(names)} linears; embedding, head and the rest in the compute type"]
    for kind, blocks in kinds.items():
        whole = blocks == list(range(blocks[0], blocks[-1] + 1))
        where = f"{blocks[0]} to {blocks[-1]}" if whole and len(blocks) > 1 else ", ".join(map(str, blocks))
        lines.append(f"  {kind:<17}  blocks {where}")
    if bounded:
        lines.append(f"  inputs of {len(bounded)} of them are scaled by their bound, without a look at the data")
    return lines
