"""What a forward and backward allocate: the model itself, run on fake tensors, which have sizes and no values.

Norms, dropout, dtypes, chunks of the loss, masks and recomputation count themselves, because the code that runs is the
training's own. Two blocks stand for all of them, a third would add what the second did; where the first ones have sites
of their own, these and two more.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models import Transformer, kernels, parameter_roles
from models.config import ModelConfig
from models.plan import resolve_plan
from pretrain.batch import make_batch
from pretrain.config import RunConfig
from pretrain.engines.recomputation import checkpoint_activations
from pretrain.planning.compiled import save_as_compiled
from pretrain.planning.terms import Terms


@dataclass(frozen=True)
class BlockCost:
    """Of one block, over what is alive when its forward begins: what it saves for its backward, and its two peaks."""

    saved: Terms
    forward: Terms
    backward: Terms


@dataclass(frozen=True)
class Trace:
    """Bytes of one micro-batch in every phase of it. Parameters and the gradients of phases gone by are not in it.

    Terms are "activations", "loss" (of the final norm, logits and loss), "gathered" (autocast's copies of weights) and
    "gradients" (those that the phase itself makes, until its end). A block's cost is over its own start, the loss's
    over what the embedding and all blocks have saved, the embedding's absolute.
    """

    embedding: Terms
    embedding_saved: Terms
    loss: Terms
    loss_backward: Terms
    embedding_backward: Terms
    blocks: list[BlockCost]  # one a block of the model


_known: dict[str, Trace] = {}  # a plan asks again for what only moves parameters about


def trace(config: RunConfig, micro_batch: int, *, gathered_bf16: bool, keeps_gradients: bool, on_gpu: bool) -> Trace:
    """Forward and backward of ``micro_batch`` sequences.

    ``gathered_bf16``: the blocks' matrices arrive in bf16, as FSDP gathers them; else autocast makes copies.
    ``keeps_gradients``: a phase's gradients wait for its end, as FSDP reduces them then; else each goes at once into
    the accumulator of earlier micro-batches. ``on_gpu``: no tensor for document masks, which FlexAttention has not, and
    the fused kernels, unless train.kernels leaves them out.

    Other operations are those of a CPU. A GPU's save the same: flash attention on either keeps query, key, value,
    output and log-sum-exp, and RMSNorm, where it is not fused, its fp32 input and a scale. Memory inside one kernel is
    not seen.
    """
    asked = (config.model, config.data, config.train, config.precision.compute, config.parallel.engine)
    key = repr((*asked, micro_batch, gathered_bf16, keeps_gradients, on_gpu))
    if key not in _known:
        _known[key] = _trace(config, micro_batch, gathered_bf16, keeps_gradients, on_gpu)
    return _known[key]


def _trace(config: RunConfig, micro_batch: int, gathered_bf16: bool, keeps_gradients: bool, on_gpu: bool) -> Trace:
    period = max(1, config.train.checkpoint_every_block or 1)
    first = resolve_plan(config.model).first_count(config.model.depth)
    depth = min(config.model.depth, first + period + 1)
    bf16 = config.precision.compute == "bf16"
    caches = config.parallel.engine == "deepspeed"  # its own autocast; engines/model.py has one without
    with FakeTensorMode():
        model = _model(replace(config.model, depth=depth, first_blocks=first), gathered_bf16)
        if on_gpu and config.train.kernels != "torch":
            kernels.fuse(model)
        checkpoint_activations(model.blocks, config.train)
        compiled = config.train.compile and config.train.activation_checkpointing == "none"
        if compiled:
            save_as_compiled(model.blocks)
        rows = torch.zeros(micro_batch, config.data.sequence_length + 1, dtype=torch.int64)
        batch = make_batch(rows, 0, config.data.document_mask and not on_gpu)

        def forward() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=caches):
                train = config.train
                return model(batch.inputs, batch.targets, batch.documents, train.z_loss, train.loss_chunk)[0]

        if compiled:
            forward()  # traces the blocks, which is not to be watched
        with _Watch(model, keeps_gradients) as watch:
            watch.enter("embedding")
            objective = forward()
            watch.enter("loss_backward")
            objective.backward()
            watch.leave()
    start, peak = watch.start, watch.peak
    traced = []
    for index in range(depth):
        begin = start[f"forward {index}"]
        end = start[f"forward {index + 1}" if index + 1 < depth else "loss"]
        traced.append(BlockCost(end - begin, peak[f"forward {index}"] - begin, peak[f"backward {index}"] - begin))
    last = depth - period  # from here on the blocks repeat themselves
    blocks = [traced[j if j < depth else last + (j - last) % period] for j in range(config.model.depth)]
    return Trace(
        embedding=peak["embedding"],
        embedding_saved=start["forward 0"],
        loss=peak["loss"] - start["loss"],
        loss_backward=peak["loss_backward"] - start["loss"],
        embedding_backward=peak["embedding_backward"],
        blocks=blocks,
    )


def _model(config: ModelConfig, gathered_bf16: bool) -> Transformer:
    model = Transformer(config)
    roles = parameter_roles(model)
    for prefix, module in model.blocks.named_modules(prefix="blocks"):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if gathered_bf16 and roles[f"{prefix}.{name}"] in ("matrix", "bias"):
                module.register_parameter(name, nn.Parameter(parameter.detach().bfloat16()))
    return model


class _Boundary(torch.autograd.Function):
    """Where the residual stream passes from one phase to the next, and in the backward the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, watch: _Watch, after: str, before: str) -> Tensor:
        ctx.watch, ctx.before = watch, before
        watch.enter(after)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.watch.enter(ctx.before)
        return grad, None, None, None


class _After(nn.Module):
    """The norm before the head, or the identity, behind a boundary."""

    def __init__(self, boundary: Callable[[nn.Module, Any], Any], norm: nn.Module | None) -> None:
        super().__init__()
        self._boundary, self.norm = boundary, norm

    def forward(self, x: Tensor) -> Tensor:
        (x,) = self._boundary(self, (x,))
        return x if self.norm is None else self.norm(x)


class _Watch(TorchDispatchMode):
    """Follows every storage from its creation to its end; ``start`` and ``peak`` are what is alive, by phase."""

    def __init__(self, model: Transformer, keeps_gradients: bool) -> None:
        super().__init__()
        self.start: dict[str, Terms] = {}
        self.peak: dict[str, Terms] = {}
        self._phase = ""
        self._alive: Counter[str] = Counter()
        self._highest = 0
        self._terms: dict[int, str] = {}  # of every storage alive
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._with_gradient: list[Tensor] = []
        self._keeps_gradients = keeps_gradients
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(self._accumulated)
        for index, block in enumerate(model.blocks):
            before = f"backward {index - 1}" if index else "embedding_backward"
            block.register_forward_pre_hook(self._boundary(f"forward {index}", before))
        # Not a hook after the last block, which would still hold the block's input.
        model.final = _After(self._boundary("loss", f"backward {len(model.blocks) - 1}"), model.final)

    def _boundary(self, after: str, before: str) -> Callable[[nn.Module, Any], Any]:
        return lambda module, arguments: (_Boundary.apply(arguments[0], self, after, before), *arguments[1:])

    def enter(self, phase: str) -> None:
        """A phase begins; the one before ends."""
        self.leave()
        self._phase, self._highest = phase, self._alive.total()
        self.start[phase] = self.peak[phase] = Terms(**self._alive)

    def leave(self) -> None:
        """The phase's gradients are the caller's from now on."""
        for parameter in self._with_gradient:
            parameter.grad = None
        self._with_gradient.clear()

    def _accumulated(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        before = self._terms[storage._cdata]
        self._terms[storage._cdata] = "gradients"
        self._alive[before] -= storage.nbytes()
        self._alive["gradients"] += storage.nbytes()
        if self._keeps_gradients:
            self._with_gradient.append(parameter)
        else:
            parameter.grad = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        copies_weight = func is torch.ops.aten._to_copy.default and self._is_parameter(args[0])
        term = "gathered" if copies_weight else "loss" if self._phase.startswith("loss") else "activations"
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not self._is_parameter(tensor):
                self._see(tensor.untyped_storage(), term)
        return out

    def _is_parameter(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._parameters

    def _see(self, storage: torch.UntypedStorage, term: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._terms:
            return
        self._terms[key] = term
        self._alive[term] += size
        weakref.finalize(storage, self._end, key, size)
        if self._alive.total() > self._highest:
            self._highest = self._alive.total()
            self.peak[self._phase] = Terms(**self._alive)

    def _end(self, key: int, size: int) -> None:
        self._alive[self._terms.pop(key)] -= size
