"""Linears whose weights are functions of parameters: formulas, gradients, what is kept, precision, spectral norms.

Whole models with them are in test_baselines.py, engines in tests/pretrain/test_engine_plans.py.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.weights import SigmaLinear, StandardizedLinear, build_linear, leading_vectors
from tests.models.building import randn

KINDS = ["standardized", "sigma"]


def make(
    kind: str, rows: int = 12, columns: int = 8, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    """With random parameters and one singular value that stands out, so that power iteration is exact."""
    linear = build_linear(kind, columns, rows, bias)
    with torch.no_grad():
        for seed, parameter in enumerate(linear.parameters()):
            parameter.copy_(1 + 0.3 * randn(*parameter.shape, seed=seed))
    return linear.to(dtype)


def derived(linear: nn.Linear) -> Tensor:
    """The weight that multiplies, by formula, differentiable, in fp64 or fp32."""
    w = linear.weight
    if isinstance(linear, StandardizedLinear):
        centered = w - w.mean(1, keepdim=True)
        return linear.gamma * linear.gain[:, None] * centered / (centered**2).sum(1, keepdim=True).sqrt()
    assert isinstance(linear, SigmaLinear)
    return linear.gain * w / torch.linalg.matrix_norm(w, ord=2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_output_and_gradients(kind: str, bias: bool) -> None:
    """Against autograd through the formula, fp64. sigma's gradient leaves out how u and v move, which is exact where
    they have converged: the second singular value is 0.2 of the first, so that 0.2^16 = 7e-12 is left."""
    linear, x = make(kind, bias=bias, dtype=torch.float64), randn(2, 3, 8, dtype=torch.float64).requires_grad_()
    names = ["x", *(name for name, _ in linear.named_parameters())]
    sources = [x, *linear.parameters()]
    probe = randn(2, 3, 12, seed=7, dtype=torch.float64)
    y = linear(x)
    expected = x @ derived(linear).T + (linear.bias if bias else 0)
    torch.testing.assert_close(y, expected, atol=1e-9, rtol=1e-9)
    for name, found, right in zip(
        names, torch.autograd.grad(y, sources, probe), torch.autograd.grad(expected, sources, probe), strict=True
    ):
        torch.testing.assert_close(found, right, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", ["x", "weight", "gain"])
def test_what_is_not_trained_gets_no_gradient(kind: str, frozen: str) -> None:
    linear, x = make(kind), randn(3, 8).requires_grad_(frozen != "x")
    for name, parameter in linear.named_parameters():
        parameter.requires_grad_(name != frozen)
    linear(x).sum().backward()
    grads = {"x": x.grad} | {name: parameter.grad for name, parameter in linear.named_parameters()}
    assert {name for name, grad in grads.items() if grad is None} == {frozen}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_the_weights_size_is_kept_but_the_weight(kind: str) -> None:
    """FSDP frees parameters between forward and backward; a copy kept by autograd would stay."""
    linear, x = make(kind, 64, 48), randn(2, 3, 48).requires_grad_()
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        linear(x)
    large = [tensor for tensor in kept if tensor.numel() >= linear.weight.numel()]
    assert len(large) == 1
    assert large[0].data_ptr() == linear.weight.data_ptr()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gathered", [torch.float32, torch.bfloat16])
def test_autocast(kind: str, gathered: torch.dtype) -> None:
    """bf16 products of a weight that was made in fp32, also from one that FSDP has gathered in bf16."""
    linear, x = make(kind), randn(5, 8).requires_grad_()
    linear.weight = nn.Parameter(linear.weight.detach().to(gathered))
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    with torch.no_grad():
        wide = make(kind)
        wide.weight.copy_(linear.weight)
        weight = derived(wide)
    expected = F.linear(x.bfloat16(), weight.bfloat16()) + linear.bias.bfloat16()
    # sigma from bf16 products is off by up to 2^-9, and that may move a weight or output to its bf16 neighbour
    torch.testing.assert_close(y, expected, atol=2**-6, rtol=2**-7)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    for parameter in linear.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_recomputation_changes_no_bit(kind: str) -> None:
    grads = []
    for recompute in (False, True):
        linear, x = make(kind), randn(5, 8).requires_grad_()
        y = checkpoint(linear, x, use_reentrant=False) if recompute else linear(x)
        y.square().sum().backward()
        grads.append([x.grad, *(parameter.grad for parameter in linear.parameters())])
    for plain, again in zip(*grads, strict=True):
        assert plain is not None
        assert torch.equal(plain, again)


def test_standardized_rows() -> None:
    """Mean 0 and norm gain, whatever the weight's scale and offset; a weight of 0 stays 0."""
    linear = StandardizedLinear(50, 20, bias=False)
    with torch.no_grad():
        linear.gain.copy_(1 + randn(20).abs())
        rows = linear(torch.eye(50)).T
        torch.testing.assert_close(rows.sum(1), torch.zeros(20), atol=1e-5, rtol=0)
        torch.testing.assert_close(rows.norm(dim=1), linear.gain, atol=1e-5, rtol=1e-5)
        linear.weight.mul_(30).add_(5)
        torch.testing.assert_close(linear(torch.eye(50)).T, rows, atol=1e-4, rtol=1e-4)
        linear.weight.zero_()
        assert not linear(torch.eye(50)).any()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_standardized_linears_keep_the_variance(activation: str) -> None:
    """Through linear, activation and linear, to 5 % in random layers of 1,000 to 2,000 features."""
    up, gate = (StandardizedLinear(1000, 2000, bias=False) for _ in range(2))
    down = build_linear("standardized", 2000, 1000, False, activation)
    with torch.no_grad():
        for seed, linear in enumerate((up, gate, down)):
            linear.weight.copy_(randn(*linear.weight.shape, seed=seed))
        x = randn(400, 1000, seed=5)
        h = up(x)
        assert h.var().item() == pytest.approx(1.0, rel=0.05)
        h = F.gelu(h, approximate="tanh") if activation == "gelu" else F.silu(gate(x)) * h
        assert down(h).var().item() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("shape", [(512, 512), (1024, 1024), (768, 2048), (2048, 768), (64, 16), (1, 8), (8, 1)])
def test_sigma_of_gaussian_weights(shape: tuple[int, int]) -> None:
    """Never above the largest singular value, and at most 7 % below, as the docstring says of the hardest case."""
    weight = randn(*shape, seed=3)
    u, v = leading_vectors(weight)
    ratio = (u @ weight @ v / torch.linalg.svdvals(weight)[0]).item()
    assert 0.93 < ratio < 1 + 1e-5


@pytest.mark.parametrize("shape", [(512, 512), (768, 2048), (2048, 768)])
@pytest.mark.parametrize("ratio", [1.5, 3.0])
def test_sigma_where_one_singular_value_stands_out(shape: tuple[int, int], ratio: float) -> None:
    """To 0.1 %: the rest's weight in the start vector is up to the number of columns, and decays as ratio^-32."""
    weight = randn(*shape, seed=3)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    values[0] = ratio * values[1]
    weight = (left * values) @ right
    u, v = leading_vectors(weight)
    assert (u @ weight @ v / values[0]).item() == pytest.approx(1.0, abs=1e-3)


def test_sigma_is_a_function_of_the_weight_alone() -> None:
    """No state: a second forward, and another module with the same weight, give the same bits."""
    linear, other, x = make("sigma"), SigmaLinear(8, 12, bias=True), randn(5, 8)
    other.load_state_dict(linear.state_dict())
    assert not list(linear.buffers())
    with torch.no_grad():
        first = linear(x)
        assert torch.equal(linear(x), first)
        assert torch.equal(other(x), first)


def test_sigma_bounds_what_a_linear_does() -> None:
    """At gain 1 and no bias no input grows by more than sigma is underestimated."""
    linear = SigmaLinear(40, 60, bias=False)
    with torch.no_grad():
        linear.weight.copy_(randn(60, 40))
        assert torch.linalg.svdvals(linear(torch.eye(40)))[0].item() == pytest.approx(1.0, abs=0.07)
        before = linear(torch.eye(40))
        linear.weight.mul_(100)
        torch.testing.assert_close(linear(torch.eye(40)), before, atol=1e-5, rtol=1e-5)


def test_plain_is_a_linear() -> None:
    assert type(build_linear("plain", 3, 4, True, "gelu")) is nn.Linear
    assert math.isclose(build_linear("standardized", 3, 4, True).gamma, 1.0)  # type: ignore[arg-type]
