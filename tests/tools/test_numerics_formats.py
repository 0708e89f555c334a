"""Rounding to a format: against every number of its grid, PyTorch's and torchao's own, and by properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models import ConfigError
from tools.quantizing.formats import (
    DEFAULT,
    FORMATS,
    Format,
    Treatment,
    fake_quantize,
    parse_formats,
    parse_treatment,
    treatments,
)
from tools.quantizing.linears import RoundedLinear

SCALED = [name for name, format in FORMATS.items() if format.largest is not None]


def grid(format: Format) -> Tensor:
    """Every number of the format, from its bits or by counting."""
    if format.dtype is None:
        assert format.largest is not None
        return torch.arange(-format.largest, format.largest + 1).float()
    values = torch.arange(256, dtype=torch.uint8).view(format.dtype).float()
    return values[values.isfinite()].unique()


def rows(seed: int, count: int = 6, columns: int = 200) -> Tensor:
    """Gaussian rows, each ten times as large as the one before."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, columns, generator=generator) * 10.0 ** torch.arange(count).unsqueeze(1)


matrices = st.builds(rows, st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 30))


def test_int4_by_hand() -> None:
    x = torch.tensor([[0.7, -0.24, 0.26, 0.0], [7.0, -6.4, 0.4, 3.6]])
    per_row = torch.tensor([[0.7, -0.2, 0.3, 0.0], [7.0, -6.0, 0.0, 4.0]])  # scales 0.1 and 1
    per_tensor = torch.tensor([[1.0, 0.0, 0.0, 0.0], [7.0, -6.0, 0.0, 4.0]])  # scale 1
    torch.testing.assert_close(fake_quantize(x, FORMATS["int4"], per_row=True), per_row)
    torch.testing.assert_close(fake_quantize(x, FORMATS["int4"], per_row=False), per_tensor)


def test_grids_are_those_of_the_formats() -> None:
    """The largest numbers are those of arXiv 2209.05433, table 1."""
    assert len(grid(FORMATS["int8"])) == 255
    assert grid(FORMATS["fp8"]).max() == FORMATS["fp8"].largest == 448 == 1.75 * 2**8
    assert grid(FORMATS["fp8-e5m2"]).max() == FORMATS["fp8-e5m2"].largest == 57344 == 1.75 * 2**15


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", SCALED)
def test_every_value_goes_to_the_nearest_number(name: str, per_row: bool) -> None:
    format = FORMATS[name]
    assert format.largest is not None
    x = rows(0)
    scale = (x.abs().amax(1, keepdim=True) if per_row else x.abs().max().expand(len(x), 1)) / format.largest
    nearest = (x.unsqueeze(-1) - scale.unsqueeze(-1) * grid(format)).abs().amin(-1)
    got = fake_quantize(x, format, per_row)
    # scale * number and x / scale are each rounded to fp32: 2^-23 of a value at most
    assert ((x - got).abs() <= nearest + 2**-22 * x.abs()).all()
    steps = got / scale
    assert torch.isclose(steps.unsqueeze(-1), grid(format), rtol=2**-22, atol=0).any(-1).all()


@pytest.mark.parametrize("per_row", [False, True])
def test_int8_is_pytorchs_fake_quantization(per_row: bool) -> None:
    x = rows(1)
    if per_row:
        scale = x.abs().amax(1) / 127
        zero = torch.zeros(len(x), dtype=torch.int32)
        wanted = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -127, 127)
    else:
        wanted = torch.fake_quantize_per_tensor_affine(x, float(x.abs().max() / 127), 0, -127, 127)
    # theirs multiplies by 1 / scale: the last bit may differ, a step where a quotient is a tie, of which there is none
    torch.testing.assert_close(fake_quantize(x, FORMATS["int8"], per_row), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_row", [False, True])
@pytest.mark.parametrize("name", ["fp8", "fp8-e5m2"])
def test_fp8_is_torchaos(name: str, per_row: bool) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    x, dtype = rows(2), FORMATS[name].dtype
    block = [1, x.shape[1]] if per_row else list(x.shape)
    scale = primitives._choose_scale_float8(x, block, dtype)
    wanted = primitives._dequantize_affine_float8(primitives._quantize_affine_float8(x, scale, dtype), scale)
    torch.testing.assert_close(fake_quantize(x, FORMATS[name], per_row), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("per_row", [False, True])
def test_a_linear_in_int8_loses_what_torchaos_loses(per_row: bool) -> None:
    """Its products are those of integers."""
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 48), torch.randn(1, 32, 64)
    ours = RoundedLinear(linear.weight, linear.bias, Treatment("int8", activations=True, per_row=per_row))(x)
    exact = linear(x).detach()
    theirs = nn.Sequential(linear)
    granularity = torchao.PerRow() if per_row else torchao.PerTensor()
    torchao.quantize_(theirs, torchao.Int8DynamicActivationInt8WeightConfig(granularity=granularity))
    got = theirs(x[0]).unsqueeze(0).detach()
    # torchao scales to 127.5, so that most values fall on other steps: errors are alike in size, not one by one
    ratio = float((got - exact).norm() / (ours.detach() - exact).norm())
    assert 0.8 < ratio < 1.25


@given(matrices, st.booleans())
def test_an_error_is_at_most_half_a_step(x: Tensor, per_row: bool) -> None:
    for name in ("int8", "int4"):
        format = FORMATS[name]
        assert format.largest is not None
        scale = (x.abs().amax(1, keepdim=True) if per_row else x.abs().max()) / format.largest
        error = (x - fake_quantize(x, format, per_row)).abs()
        assert (error <= 0.5 * scale + 2**-22 * x.abs()).all()  # fp32 rounds the quotient and the product


@given(matrices, st.booleans(), st.integers(-20, 20))
def test_scaling_by_a_power_of_two_changes_nothing_but_the_scale(x: Tensor, per_row: bool, power: int) -> None:
    for name in SCALED:
        wanted = 2.0**power * fake_quantize(x, FORMATS[name], per_row)
        assert torch.equal(fake_quantize(2.0**power * x, FORMATS[name], per_row), wanted), name


@given(matrices, st.booleans())
def test_it_is_odd_finite_and_keeps_the_largest(x: Tensor, per_row: bool) -> None:
    for name in SCALED:
        got = fake_quantize(x, FORMATS[name], per_row)
        assert torch.equal(fake_quantize(-x, FORMATS[name], per_row), -got), name
        assert got.isfinite().all()
        largest = x.abs().amax(1) if per_row else x.abs().max()
        torch.testing.assert_close(got.abs().amax(1) if per_row else got.abs().max(), largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", list(FORMATS))
def test_zeros_stay_zeros(name: str) -> None:
    x = rows(3)
    x[2] = 0
    for per_row in (False, True):
        assert torch.equal(fake_quantize(x, FORMATS[name], per_row)[2], torch.zeros(x.shape[1]))
        assert torch.equal(fake_quantize(0 * x, FORMATS[name], per_row), 0 * x)


@pytest.mark.parametrize("name", SCALED)
def test_what_is_beyond_the_largest_number_saturates(name: str) -> None:
    """1.49 times the largest number in units of fp32's smallest: the scale, 1.49 units, is rounded to one of them."""
    largest = FORMATS[name].largest
    assert largest is not None
    smallest = 2.0**-149
    x = torch.tensor([[1.49 * largest * smallest, -smallest]])
    assert x[0, 0] > largest * smallest, "subnormal numbers are not flushed to zero"
    wanted = torch.tensor([[largest * smallest, -smallest]])
    assert torch.equal(fake_quantize(x, FORMATS[name], per_row=True), wanted)


def lost_by_row(x: Tensor, name: str, per_row: bool) -> Tensor:
    return (x - fake_quantize(x, FORMATS[name], per_row)).square().mean(1)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_lose_less_with_a_scale_a_row(name: str) -> None:
    """A row a tenth as large has a step a tenth as large."""
    x = rows(4)
    apart, together = lost_by_row(x, name, True), lost_by_row(x, name, False)
    assert (apart <= together).all()
    assert (apart[:-1] < 0.1 * together[:-1]).all()


def test_floats_gain_from_it_only_where_they_run_out_of_exponents() -> None:
    """A float's error is relative. Below 2^-6 / 448 of the largest, e4m3 is subnormal; e5m2 has 2^-14 / 57344."""
    x = rows(4)  # the smallest row is 10^-5 of the largest
    near = slice(2, None)
    for name in ("fp8", "fp8-e5m2"):
        ratio = lost_by_row(x, name, False) / lost_by_row(x, name, True)
        assert ((ratio[near] > 0.5) & (ratio[near] < 2)).all(), name
    assert (lost_by_row(x, "fp8", False) > 10 * lost_by_row(x, "fp8", True))[0]


@pytest.mark.parametrize("name", SCALED)
def test_sequences_are_scaled_apart(name: str) -> None:
    x = torch.stack([rows(5), 1000 * rows(6)])
    together = fake_quantize(x, FORMATS[name], per_row=False)
    assert torch.equal(together, torch.stack([fake_quantize(one, FORMATS[name], per_row=False) for one in x]))


def test_an_outlier_ruins_int8_per_tensor_and_not_fp8_per_row() -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 64, bias=False), torch.randn(1, 128, 64)
    lost = {}
    for outlier in (1.0, 300.0):
        given = x.clone()
        given[..., 5] *= outlier
        exact = linear(given)
        for name, per_row in (("int8", False), ("fp8", True)):
            got = RoundedLinear(linear.weight, None, Treatment(name, activations=True, per_row=per_row))(given)
            other = given.clone()
            other[..., 5] = 0  # what the other features lose, which the outlier would hide
            kept = Treatment(name, activations=True, per_row=per_row).round(given).clone()
            kept[..., 5] = 0
            lost[name, outlier] = float((kept - other).norm() / other.norm())
            assert (got - exact).isfinite().all()
    assert lost["int8", 1.0] < lost["fp8", 1.0]  # without one, eight bits of integers are finer
    assert lost["int8", 300.0] > 5 * lost["fp8", 300.0]
    assert lost["fp8", 300.0] < 1.5 * lost["fp8", 1.0]


def test_treatments_have_names() -> None:
    all_of_them = treatments(DEFAULT)
    assert len(all_of_them) == 2 + 4 * len(DEFAULT)
    assert [one.name for one in all_of_them[:6]] == [
        "bf16-w", "bf16-wa", "int8-w-tensor", "int8-w-row", "int8-wa-tensor", "int8-wa-row",
    ]  # fmt: skip
    assert all(parse_treatment(one.name) == one for one in treatments(list(FORMATS)))
    assert parse_formats("int8, fp8,int8") == ["int8", "fp8"]
    x = torch.tensor([[1 + 2**-9, math.pi]])
    assert torch.equal(Treatment("bf16", activations=False, per_row=False).round(x), torch.tensor([[1.0, 3.140625]]))


@pytest.mark.parametrize(
    ("parse", "text", "words"),
    [
        (parse_formats, "int9", "--formats: 'int9' is no format: did you mean 'int8'?"),
        (parse_formats, " ,", "--formats names none"),
        (parse_treatment, "int8-wa-rows", "did you mean 'int8-wa-row'?"),
        (parse_treatment, "all", "choose one of bf16-w"),
    ],
)
def test_mistakes_name_what_to_write(parse: object, text: str, words: str) -> None:
    assert callable(parse)
    with pytest.raises(ConfigError) as told:
        parse(text)
    assert words in str(told.value)
    assert "\n" not in str(told.value)
