"""Rounding to bf16: exhaustively over the noise where that is finite, statistically over the generator's."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.errors import ConfigError
from pretrain.optimizers import MSGDW, CompactAdamW, slices
from pretrain.optimizers.elementwise import Elementwise
from pretrain.optimizers.slices import Slice
from pretrain.optimizers.storage import Storage, round_stochastically

EVERY_NOISE = torch.arange(2**16, dtype=torch.int32)
EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
LARGEST = torch.finfo(torch.bfloat16).max
BUILDERS: dict[str, Callable[..., Elementwise]] = {
    "msgdw": lambda held, **given: MSGDW(held, 1e-3, 0.999, state_dtype=torch.bfloat16, **given),
    "adamw": lambda held, **given: CompactAdamW(held, 1e-3, betas=(0.9, 0.999), **given),
}


def rounded(exact: Tensor, noise: Tensor) -> Tensor:
    out = torch.empty_like(exact, dtype=torch.bfloat16)
    round_stochastically(exact.clone(), noise.clone(), out)
    return out


def fp32(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)


def bits_of(tensor: Tensor) -> list[int]:
    return tensor.view(torch.int16).tolist()


@pytest.mark.parametrize("noise", [0, 1, 2**15, 2**16 - 1])
def test_every_bf16_number_stays_bit_for_bit(noise: int) -> None:
    kept = rounded(EVERY_BF16.float(), torch.full((2**16,), noise, dtype=torch.int32))
    nan = EVERY_BF16.isnan()
    assert nan.sum() == 2 * 127  # both signs, 7 bits that are not all 0
    assert torch.equal(kept.isnan(), nan)
    assert bits_of(kept[~nan]) == bits_of(EVERY_BF16[~nan])  # -0 and both infinities among them


@pytest.mark.parametrize("bits", [0x7F800001, 0x7F80FFFF, 0x7FC00000, 0x7FFFFFFF, 0xFF800001, 0xFFFFFFFF])
def test_no_noise_makes_a_number_of_a_nan(bits: int) -> None:
    """The ends of the range overflow or lose their payload: 0x7FFFFFFF is what CUDA's arithmetic gives."""
    assert rounded(fp32(bits).expand(2**16), EVERY_NOISE).isnan().all()


@pytest.mark.parametrize("low", [0, 1, 2**15, 40_503, 2**16 - 1])
@pytest.mark.parametrize(
    "high",
    [0x3F80, 0x3FFF, 0x0000, 0x0001, 0x007F, 0x0080, 0x7F7E, 0xBF80, 0x8000, 0x807F],
    ids=["1", "below 2", "0", "subnormal", "largest subnormal", "normal", "large", "-1", "-0", "-subnormal"],
)
def test_of_all_noise_just_the_right_share_rounds_away_from_zero(high: int, low: int) -> None:
    """Hence the mean over a uniform noise is the number itself."""
    exact = fp32(high << 16 | low)
    inner, outer = fp32(high << 16, (high + 1) << 16).double()
    ends = rounded(exact.expand(2**16), EVERY_NOISE).double()
    assert ends.eq(outer).sum() == low
    assert ends.eq(inner).sum() == 2**16 - low
    assert ends.mean().item() == exact.double().item()  # exact in fp64: 2^16 summands of 8 bits, 16 bits apart


def test_any_number_becomes_one_of_its_neighbours_and_signs_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    count = 2**18
    exact = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32).view(torch.float32)
    exact = exact[exact.abs() <= LARGEST]  # leaves NaN out too
    noise = torch.randint(2**16, exact.shape, generator=generator, dtype=torch.int32)
    result = rounded(exact, noise)
    assert bits_of(rounded(-exact, noise)) == bits_of(-result)
    nearest = exact.bfloat16()
    # Of the two neighbours, one is the nearest; the other lies beyond the number, one bf16 step from it.
    step = torch.where(nearest.double().abs() > exact.double().abs(), -1, 1).to(torch.int16)
    other = (nearest.view(torch.int16) + step).view(torch.bfloat16)
    other = torch.where(nearest.float() == exact, nearest, other)
    assert (result.eq(nearest) | result.eq(other)).all()
    assert (result != nearest).float().mean() > 0.1  # a quarter if fractions are uniform


def test_beyond_the_largest_number_is_infinity_or_it() -> None:
    ends = rounded(torch.tensor(torch.finfo(torch.float32).max).expand(2**16), EVERY_NOISE)
    assert set(ends.tolist()) == {LARGEST, float("inf")}


# ---------------------------------------------------------------------- where the noise comes from


def one_slice(size: int, number: int = 0, shard: tuple[int, ...] = (), piece: int = 0) -> Slice:
    moments = (torch.empty(size, dtype=torch.bfloat16), torch.empty(size, dtype=torch.bfloat16))
    return Slice(torch.empty(size), torch.empty(size), moments, None, number, shard, piece)


def kept(one: Slice, noise: int, value: float) -> tuple[Tensor, Tensor]:
    """Both moments of ``value``, stored."""
    size = one.parameter.shape
    Storage(torch.bfloat16, "stochastic").keep([one], [[torch.full(size, value)], [torch.full(size, value)]], noise)
    return one.moments[0], one.moments[1]


@pytest.mark.parametrize("low", [655, 2**15, 60_000])
def test_storage_is_unbiased_and_its_two_moments_are_independent(low: int) -> None:
    """Counts are binomial; five standard deviations (the seeds are fixed, so this passes always or never)."""
    size, p = 2**20 + 1, low / 2**16
    first, second = (moment > 1 for moment in kept(one_slice(size), 0, 1 + low * 2.0**-23))
    for ups, share in ((first, p), (second, p), (first & second, p * p), (first[1:] & first[:-1], p * p)):
        # neighbouring pairs overlap: their count has at most three times the variance of independent ones
        assert abs(ups.sum().item() - len(ups) * share) < 5 * sqrt(3 * size * share * (1 - share))


def test_noise_is_repeatable_and_another_for_each_step_parameter_shard_and_piece() -> None:
    size, half = 2**16, 1 + 2.0**-8
    again, *others = [
        kept(one_slice(size, *where), noise, half)
        for noise, where in [
            (5, (1, (1,), 1)),
            (6, (1, (1,), 1)),
            (5, (0, (1,), 1)),
            (5, (1, (0,), 1)),
            (5, (1, (), 1)),
            (5, (1, (1,), 0)),
            (5, (1, (1, 1), 1)),
            ((1 << 32) + 5, (1, (1,), 1)),
        ]
    ]
    state = torch.get_rng_state()
    torch.manual_seed(123)  # of no influence
    same = kept(one_slice(size, 1, (1,), 1), 5, half)
    assert all(torch.equal(a, b) for a, b in zip(again, same, strict=True))
    for other in others:
        for a, b in zip(again, other, strict=True):
            agree = a.eq(b).sum().item()
            assert abs(agree - size / 2) < 5 * sqrt(size / 4)  # two fair coins
    torch.set_rng_state(state)


@pytest.mark.parametrize("name", BUILDERS)
def test_pieces_of_one_parameter_have_noise_of_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "CHUNK_ELEMENTS_CPU", 64)
    held = nn.Parameter(torch.ones(2, 64))
    held.grad = torch.full_like(held, 0.3)
    optimizer = BUILDERS[name]([held])
    optimizer.step()
    for moment in optimizer.MOMENTS:
        above, below = optimizer.state[held][moment]
        assert not torch.equal(above, below)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    kept(one_slice(100), 0, 1.001)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_wrong_rounding_is_the_users_mistake() -> None:
    with pytest.raises(ConfigError, match=r"optimizer\.state_rounding is 'up': write stochastic or nearest"):
        Storage(torch.bfloat16, "up")  # type: ignore[arg-type]


# ---------------------------------------------------------------------- what it does to an optimizer


@pytest.mark.parametrize(
    ("name", "moment", "first", "then"),
    [("msgdw", "momentum_buffer", 1.0, 0.001 * 2.25), ("adamw", "exp_avg_sq", sqrt(1000.0), 1.5)],
)
def test_nearest_stalls_where_stochastic_follows_on_average(name: str, moment: str, first: float, then: float) -> None:
    """x ← 0.999 x + 0.001 · 2.25 from 1 on: a step changes x by less than the half of 2⁻⁷, bf16's step above 1.

    The stochastic error is a martingale. Each rounding has at most the variance of a fair coin between numbers 2⁻⁶
    apart (x stays below 4), what it leaves decays by 0.999, and the elements are independent.
    """
    steps, size = 1000, 4096
    ends = {}
    for rounding in ("nearest", "stochastic"):
        held = nn.Parameter(torch.zeros(size))
        optimizer = BUILDERS[name]([held], state_rounding=rounding)
        for step in range(1 + steps):
            held.grad = torch.full((size,), then if step else first)
            optimizer.step()
        ends[rounding] = optimizer.state[held][moment].double()
    assert (ends["nearest"] == 1.0).all()
    reference = 2.25 - 1.25 * 0.999**steps  # 1.79
    variance = (2.0**-6) ** 2 / 4 * (1 - 0.999 ** (2 * steps)) / (1 - 0.999**2)
    assert abs(ends["stochastic"].mean().item() - reference) < 5 * sqrt(variance / size)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("name", BUILDERS)
def test_temporaries_are_no_larger_than_a_chunk(name: str, rounding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "CHUNK_ELEMENTS_CPU", 64)
    held = [nn.Parameter(torch.ones(shape)) for shape in ((50, 20), (1000,), (3,), (5,))]
    optimizer = BUILDERS[name](held, state_rounding=rounding)
    for parameter in held:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    known = {t.untyped_storage().data_ptr() for p in held for t in (p, p.grad, *optimizer.state[p].values())}
    made: list[int] = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            results = function(*args, **(kwargs or {}))
            for result in results if isinstance(results, list | tuple) else [results]:
                if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in known:
                    made.append(result.untyped_storage().nbytes())
            return results

    with Record():
        optimizer.step()
    assert max(made) == 64 * 4


@pytest.mark.parametrize("name", BUILDERS)
def test_state_is_created_in_bf16_and_is_half_as_large(name: str) -> None:
    def moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        return [state for state in optimizer.state[parameter].values() if state.dim()]

    held, other = nn.Parameter(torch.ones(30, 10)), nn.Parameter(torch.ones(30, 10))
    wide = MSGDW([other], 0.1) if name == "msgdw" else torch.optim.AdamW([other], fused=True)
    stored = moments(BUILDERS[name]([held]), held)
    assert {moment.dtype for moment in stored} == {torch.bfloat16}
    assert 2 * sum(m.untyped_storage().nbytes() for m in stored) == sum(
        m.untyped_storage().nbytes() for m in moments(wide, other)
    )
