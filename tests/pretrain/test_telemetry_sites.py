"""The record of DyT's sites: right numbers, one pass, no trace afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pretrain.telemetry import record_sites, scalars


class TinyDyT(nn.Module):
    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([alpha]))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x)


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = TinyDyT(0.5)
        self.middle = nn.Linear(8, 8)
        self.second = nn.Sequential(TinyDyT(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.middle(self.first(x)))


@pytest.fixture
def batch() -> Tensor:
    return 3.0 * torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)) + 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_and_inverse_std_of_each_site(batch: Tensor, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Tiny().to(dtype)
    x = batch.to(dtype)
    with record_sites(model) as sites:
        model(x)
    assert list(sites) == ["first", "second.0"]
    inner = model.middle(torch.tanh(model.first.alpha * x)).detach()
    for name, alpha, data in (("first", 0.5, x), ("second.0", 2.0, inner)):
        centered = data.double() - data.double().mean()
        assert sites[name].alpha.tolist() == [alpha]
        assert sites[name].inverse_std.dtype == torch.float32
        # 192 numbers, reduced in fp32
        assert sites[name].inverse_std.item() == pytest.approx(centered.square().mean().item() ** -0.5, rel=1e-5)
    values = scalars(sites)
    assert list(values) == ["alpha/first", "inverse_std/first", "alpha/second.0", "inverse_std/second.0"]
    assert values["alpha/second.0"] == 2.0
    assert values["inverse_std/first"] == sites["first"].inverse_std.item()


def test_the_record_is_a_copy_and_leaves_no_hook(batch: Tensor) -> None:
    model = Tiny()
    with record_sites(model) as sites:
        model(batch)
    before = sites["first"].inverse_std.item()
    with torch.no_grad():
        model.first.alpha.fill_(9.0)
    model(batch * 5)
    assert sites["first"].alpha.item() == 0.5
    assert sites["first"].inverse_std.item() == before
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_hooks_go_even_if_the_pass_fails() -> None:
    model = Tiny()
    with pytest.raises(RuntimeError), record_sites(model):
        model(torch.zeros(2, 3))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_recording_changes_neither_output_nor_gradients(batch: Tensor) -> None:
    torch.manual_seed(0)
    model = Tiny()
    plain = torch.autograd.grad(model(batch).sum(), list(model.parameters()))
    with record_sites(model):
        recorded = torch.autograd.grad(model(batch).sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))


def test_a_compiled_block_is_recorded_too(batch: Tensor) -> None:
    model = Tiny()
    model.compile(backend="aot_eager")
    model(batch)  # compiled before there is any hook
    with record_sites(model) as sites:
        model(batch)
    assert list(sites) == ["first", "second.0"]


def test_a_model_without_alpha_has_no_sites(batch: Tensor) -> None:
    model = nn.Linear(8, 8)
    with record_sites(model) as sites:
        model(batch)
    assert scalars(sites) == {}
