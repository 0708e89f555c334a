"""The operations that models/kernels fuses, the same in plain PyTorch and by Liger, and the least that they move."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import kernels
from models.errors import ConfigError, nearest
from models.rotary import rotary_table, rotate

_EPS = 1e-5


@dataclass(frozen=True)
class Shapes:
    """``tokens`` rows of ``width`` features, or of ``heads`` heads, ``ffn_width`` features or ``vocabulary`` logits."""

    tokens: int = 8192
    width: int = 4096
    heads: int = 32
    ffn_width: int = 11008
    vocabulary: int = 32000
    length: int = 2048
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        for name in ("tokens", "width", "heads", "ffn_width", "vocabulary", "length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} is {getattr(self, name)}: write a positive number")
        if self.width % (2 * self.heads):
            raise ConfigError(f"--width {self.width} is not a multiple of twice --heads {self.heads}, as RoPE needs")
        if self.tokens % self.length:
            raise ConfigError(f"--tokens {self.tokens} is not a multiple of --length {self.length}")


@dataclass(frozen=True)
class Case:
    """An operation: ``ours``, ``plain`` and, where it has one, ``liger`` are functions of the tensors that ``make``
    makes; with them it returns the bytes of one of the operation's size.

    ``passes``: how many tensors of that size are read or written at the least, forward and backward: every operand
    and every result once, of backward the gradients of all results among them; 0 where there is no backward.
    Cross-entropy comes with its gradient in one pass, as training uses it (models/loss.py).
    """

    ours: Callable[..., Any]
    plain: Callable[..., Any]
    make: Callable[[Shapes, torch.device], tuple[list[Tensor], int]]
    passes: tuple[int, int]
    liger: Callable[..., Any] | None = None
    loss: Callable[[Tensor, Tensor], Tensor] | None = None  # whose gradient ``plain`` is: autograd is not compiled

    def compiled(self) -> Callable[..., Any]:
        """``plain`` by torch.compile, for these shapes alone."""
        if self.loss is None:
            return torch.compile(self.plain, dynamic=False)
        return functools.partial(_gradient, torch.compile(self.loss, dynamic=False))


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype).requires_grad_()


def _rows(branches: int, *parameters: str) -> Callable[[Shapes, torch.device], tuple[list[Tensor], int]]:
    """Tensors [tokens, width], then parameters in fp32: an alpha [1] or a gain [width]."""

    def make(shapes: Shapes, device: torch.device) -> tuple[list[Tensor], int]:
        size = (shapes.tokens, shapes.width)
        tensors = [_random(size, shapes.dtype, device) for _ in range(branches)]
        for name in parameters:
            count = 1 if name == "alpha" else shapes.width
            tensors.append(torch.full((count,), 0.5, device=device, requires_grad=True))
        return tensors, shapes.tokens * shapes.width * shapes.dtype.itemsize

    return make


def _heads(*parameters: str) -> Callable[[Shapes, torch.device], tuple[list[Tensor], int]]:
    """x [batch, length, heads, head width], RoPE's tables, then a gain of the head width if there is one."""

    def make(shapes: Shapes, device: torch.device) -> tuple[list[Tensor], int]:
        head = shapes.width // shapes.heads
        size = (shapes.tokens // shapes.length, shapes.length, shapes.heads, head)
        tensors = [_random(size, shapes.dtype, device), *rotary_table(shapes.length, head, 1e4, device)]
        tensors += [torch.full((head,), 0.5, device=device, requires_grad=True) for _ in parameters]
        return tensors, shapes.tokens * shapes.width * shapes.dtype.itemsize

    return make


def _gates(shapes: Shapes, device: torch.device) -> tuple[list[Tensor], int]:
    size = (shapes.tokens, shapes.ffn_width)
    tensors = [_random(size, shapes.dtype, device) for _ in range(2)]
    return tensors, shapes.tokens * shapes.ffn_width * shapes.dtype.itemsize


def _logits(shapes: Shapes, device: torch.device) -> tuple[list[Tensor], int]:
    logits = _random((shapes.tokens, shapes.vocabulary), shapes.dtype, device).detach()
    targets = torch.randint(shapes.vocabulary, (shapes.tokens,), device=device)
    return [logits, targets], logits.numel() * shapes.dtype.itemsize


def _plain_dyt(x: Tensor, alpha: Tensor, gain: Tensor) -> Tensor:
    return (gain * torch.tanh(alpha * x.float())).to(x.dtype)


def _plain_derf(x: Tensor, alpha: Tensor, gain: Tensor, beta: Tensor) -> Tensor:
    return (gain * torch.erf(alpha * x.float()) + beta).to(x.dtype)


def _plain_rms(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x.float(), x.shape[-1:], gain, _EPS).to(x.dtype)


def _after_add(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def plain(x: Tensor, branch: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        stream = x + branch
        return stream, function(stream, *parameters)

    return plain


def _plain_norm_twice(x: Tensor, branch: Tensor, branch_gain: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    stream = x + _plain_rms(branch, branch_gain)
    return stream, _plain_rms(stream, gain)


def _plain_rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    return rotate(x.transpose(1, 2), (cosine, sine)).transpose(1, 2)


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _gradient(loss: Callable[[Tensor, Tensor], Tensor], logits: Tensor, targets: Tensor) -> Tensor:
    """Of the summed loss, by autograd: what the fused cross-entropy leaves in place of the logits."""
    wanted = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(wanted, targets), wanted)[0]


def _liger(path: str) -> Callable[..., Any]:
    """A function of liger_kernel.ops, found when it is first called; by name, as it is no requirement of ours."""

    @functools.cache
    def found() -> Callable[..., Any]:
        module, name = path.split(":")
        function: Callable[..., Any] = getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply
        return function

    return lambda *arguments: found()(*arguments)


_LIGER_DYT = _liger("dyt:LigerDyTFunction")
_LIGER_RMS = _liger("rms_norm:LigerRMSNormFunction")
_LIGER_ADD = _liger("fused_add_rms_norm:LigerFusedAddRMSNormFunction")
_LIGER_LOSS = _liger("cross_entropy:LigerCrossEntropyFunction")


def _liger_loss(logits: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = _LIGER_LOSS(logits, targets, None, -100, 0.0, 0.0, "sum")[0]
    return loss


CASES: dict[str, Case] = {
    "dyt": Case(
        kernels.dyt,
        _plain_dyt,
        _rows(1, "alpha", "gain"),
        (2, 3),
        lambda x, alpha, gain: _LIGER_DYT(x, alpha, gain, None),
    ),
    "derf": Case(
        lambda x, alpha, gain, beta: kernels.dyt(x, alpha, gain, beta, function="erf"),
        _plain_derf,
        _rows(1, "alpha", "gain", "beta"),
        (2, 3),
    ),
    "add_dyt": Case(kernels.add_dyt, _after_add(_plain_dyt), _rows(2, "alpha", "gain"), (4, 4)),
    "rms_norm": Case(
        lambda x, gain: kernels.rms_norm(x, gain, _EPS),
        _plain_rms,
        _rows(1, "gain"),
        (2, 3),
        lambda x, gain: _LIGER_RMS(x, gain, _EPS, 0.0, "llama", False),
    ),
    "add_rms_norm": Case(
        lambda x, branch, gain: kernels.add_rms_norm(x, branch, gain, _EPS),
        _after_add(_plain_rms),
        _rows(2, "gain"),
        (4, 4),
        lambda x, branch, gain: _LIGER_ADD(branch, x, gain, _EPS, 0.0, "llama", False),
    ),
    "rms_norm_add": Case(
        lambda x, branch, gain: kernels.rms_norm_add(x, branch, gain, _EPS),
        lambda x, branch, gain: x + _plain_rms(branch, gain),
        _rows(2, "gain"),
        (3, 3),  # the stream's gradient is the result's own
    ),
    "rms_norm_add_rms_norm": Case(
        lambda x, branch, own, gain: kernels.rms_norm_add_rms_norm(x, branch, own, _EPS, gain, _EPS),
        _plain_norm_twice,
        _rows(2, "gain", "gain"),
        (4, 6),
    ),
    "rotate": Case(kernels.rotate, _plain_rotate, _heads(), (2, 2)),
    "rms_norm_rotate": Case(
        lambda x, cosine, sine, gain: kernels.rms_norm_rotate(x, cosine, sine, gain, _EPS),
        lambda x, cosine, sine, gain: _plain_rotate(_plain_rms(x, gain), cosine, sine),
        _heads("gain"),
        (2, 3),
    ),
    "silu_mul": Case(
        kernels.silu_mul,
        lambda gate, up: F.silu(gate) * up,
        _gates,
        (3, 5),
        _liger("swiglu:LigerSiLUMulFunction"),
    ),
    "cross_entropy": Case(
        lambda logits, targets: kernels.cross_entropy_(logits, targets, 0.0, True),
        functools.partial(_gradient, _loss),
        _logits,
        (2, 0),
        functools.partial(_gradient, _liger_loss),
        _loss,
    ),
}


def check_names(names: Sequence[str]) -> None:
    """ConfigError if one of them is no case's."""
    for name in names:
        if name not in CASES:
            raise ConfigError(f"--only: there is no kernel {name!r}; {nearest(name, CASES)}")
