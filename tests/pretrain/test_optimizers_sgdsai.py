"""SGD-SaI against the formula in fp64, over steps, restarts and gradients without a spread."""

from __future__ import annotations

import io
from functools import partial
from math import sqrt

import pytest
import torch
from torch import Tensor, nn

from models.errors import ConfigError
from pretrain.optimizers import SGDSaI, slices
from pretrain.optimizers.sgdsai import signal_to_noise
from tests.pretrain import stepping

SHAPES = [(30, 20), (7,), (4, 4), (0, 5)]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return stepping.parameters(SHAPES, dtype)


def gradients(step: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Of tensors whose means and scales differ."""
    return [(g + i) * 10.0**-i for i, g in enumerate(stepping.gradients(SHAPES, step, dtype))]


train = partial(stepping.train, gradients=gradients, lr=lambda step: 0.01 / (1 + step))


@pytest.mark.parametrize("chunk", [5, 2**24])
def test_it_follows_the_formula(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The authors' update (their repository, 1.0.3) of whole tensors in fp64, in pieces too."""
    monkeypatch.setattr(slices, "CHUNK_ELEMENTS_CPU", chunk)
    held = parameters()
    expected = [parameter.detach().clone() for parameter in held]
    optimizer = SGDSaI(held, 0.01, 0.8, weight_decay=0.1, eps=1e-8, state_dtype=torch.float64)
    train(optimizer, range(5))
    for i, p in enumerate(expected):
        first = gradients(0)[i]
        snr = first.norm() / (first.std() + 1e-8) if first.numel() else torch.tensor(0.0)
        m = first.clone()
        for step in range(5):
            lr = 0.01 / (1 + step)
            if step:
                m = 0.8 * m + (1 - 0.8) * gradients(step)[i]
            p = (1 - lr * 0.1) * p - lr * snr * m
        # fp64, but for the g-SNR, which is kept in fp32
        torch.testing.assert_close(held[i].detach(), p, rtol=1e-6, atol=1e-6)
        if p.numel():
            assert optimizer.state[held[i]]["gsnr"].item() == pytest.approx(snr.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("gradient", "why"),
    [
        ([0.3], "one element"),
        ([0.25] * 9, "no spread"),
        ([0.1] * 9, "no spread but fp64's rounding"),
        ([0.0] * 9, "nothing"),
        ([1.0, float("nan")], "nan"),
        ([1.0, float("inf"), 2.0, 3.0], "infinity"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_first_gradient_without_a_spread_counts_as_one_of_mean_0(gradient: list[float], why: str) -> None:
    held = nn.Parameter(torch.zeros(len(gradient)))
    held.grad = torch.tensor(gradient)
    assert signal_to_noise(held, 1e-8).item() == pytest.approx(sqrt(len(gradient))), why


def test_a_gradient_of_mean_0_has_nearly_that() -> None:
    held = nn.Parameter(torch.zeros(10_000))
    held.grad = torch.randn(10_000, generator=torch.Generator().manual_seed(3))
    # std / rms is 1 - mean²/2 ± ..., the mean being of the order 1/100
    assert signal_to_noise(held, 1e-8).item() == pytest.approx(100.0, rel=1e-3)


def test_the_scale_is_measured_once_at_the_first_step_that_moves() -> None:
    held = parameters(torch.float32)
    optimizer = SGDSaI(held, 0.01)
    for parameter in held:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.param_groups[0]["lr"] = 0.0  # as torch does to be told the state's names
    optimizer.step()
    assert not optimizer.param_groups[0]["measured"]
    plain = parameters(torch.float32)
    straight = SGDSaI(plain, 0.01)
    train(optimizer, range(3))
    train(straight, range(3))
    assert optimizer.param_groups[0]["measured"]
    for a, b in zip(held, plain, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["gsnr"], straight.state[b]["gsnr"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("before", [0, 2])
def test_resume_is_bitwise(before: int, dtype: torch.dtype) -> None:
    whole = parameters(torch.float32)
    train(SGDSaI(whole, 0.01, state_dtype=dtype), range(5))
    held = parameters(torch.float32)
    optimizer = SGDSaI(held, 0.01, state_dtype=dtype)
    train(optimizer, range(before))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = SGDSaI(held, 0.01, state_dtype=dtype)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(resumed, range(before, 5))
    assert all(torch.equal(a, b) for a, b in zip(whole, held, strict=True))


def test_a_momentum_out_of_range_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.momentum is 1\.0"):
        SGDSaI(parameters(), 0.1, momentum=1.0)
