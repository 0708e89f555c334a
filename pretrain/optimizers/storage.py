"""How an optimizer's moments are kept between steps: in which dtype, and how results are rounded to it."""

from __future__ import annotations

from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from models.errors import ConfigError
from pretrain.optimizers.slices import Slice

Rounding = Literal["stochastic", "nearest"]


def round_stochastically(exact: Tensor, bits: Tensor, out: Tensor) -> None:
    """Round fp32 ``exact`` to one of the two bf16 neighbours that enclose it, at random and right on average.

    ``bits`` is int32 of the same shape, uniform in [0, 2¹⁶); both it and ``exact`` are overwritten, ``out`` is bf16.
    A bf16 number is an fp32 number whose low 16 bits are 0. In any other, they say how far it is from the neighbour
    nearer to 0 towards the other one, in steps of 2⁻¹⁶ of their distance, whatever sign and exponent, subnormals
    included. Adding uniform bits carries into the upper half with just that probability; then the low half is cut
    off. So the mean is ``exact``, bf16 numbers (0, -0 and infinities too) stay what they are, and NaN stays NaN. What
    is beyond bf16's largest number may become infinite, as when it is rounded to nearest.

    Source: Zamirai et al., "Revisiting BFloat16 Training", arXiv 2010.06192.
    """
    rounded = bits.add_(exact.view(torch.int32)).bitwise_and_(-(2**16)).view(torch.float32)
    # The carry makes numbers of NaNs: 0 · exact is added, ±0 or NaN, with infinities bounded first for they stay.
    out.copy_(rounded.add_(exact.clamp_(-1.0, 1.0), alpha=0.0))


class Storage:
    """Keeps moments in ``dtype``; bf16 is rounded to nearest or stochastically, wider ones are worked on in place.

    The noise of stochastic rounding is a function of a number that the caller gives (see
    :class:`pretrain.optimizers.elementwise.Elementwise`), the parameter's place in its group and this rank's place
    among the shards of it: a generator of this class's own, one a device, is seeded anew for every parameter. Hence
    ranks that replicate a parameter, or a shard of it, round alike and stay equal bit for bit; shards, parameters and
    steps have different noise; a resumed run goes on with the noise it would have had; the process's global generators
    are left alone; and nothing waits for the device. A plain tensor is taken for a whole parameter, so partitions
    under ZeRO share their noise, which biases none of them.

    Raises:
        ConfigError: no such rounding.
    """

    def __init__(self, dtype: torch.dtype, rounding: Rounding) -> None:
        if rounding not in ("stochastic", "nearest"):
            raise ConfigError(f"optimizer.state_rounding is {rounding!r}: write stochastic or nearest")
        assert dtype.is_floating_point
        self.dtype = dtype
        self._wide = torch.promote_types(dtype, torch.float32)
        self.is_stochastic = dtype == torch.bfloat16 and rounding == "stochastic"
        self._generators: dict[torch.device, torch.Generator] = {}

    def widen(self, slices: list[Slice]) -> list[list[Tensor]]:
        """For each moment one tensor a slice to compute with: the stored one if that is fp32 or wider, else a copy."""
        by_moment = zip(*(one.moments for one in slices), strict=True)
        return [[moment.to(self._wide) for moment in moments] for moments in by_moment]

    def keep(self, slices: list[Slice], computed: list[list[Tensor]], noise: int) -> None:
        """Round what ``widen`` gave, and the step has changed, back to where it is stored."""
        if self._wide == self.dtype:
            return
        if not self.is_stochastic:
            for i, moments in enumerate(computed):
                torch._foreach_copy_([one.moments[i] for one in slices], moments)
            return
        for one, *moments in zip(slices, *computed, strict=True):
            drawn = self._draw(one, noise)
            for stored, exact, halves in zip(one.moments, moments, drawn, strict=True):
                # The mask undoes the sign that widening spreads over the upper half.
                round_stochastically(exact, halves.to(torch.int32).bitwise_and_(2**16 - 1), stored)

    def _draw(self, one: Slice, noise: int) -> Tensor:
        """Uniform int16, one an element of each moment: [moments, *shape]."""
        device, count = one.parameter.device, one.parameter.numel() * len(one.moments)
        generator = self._generators.get(device)
        if generator is None:
            generator = self._generators[device] = torch.Generator(device)
        name = f"{noise} {one.number} {one.shard} {one.piece}"
        # A CPU's generator takes the low 32 bits of it.
        generator.manual_seed(int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little"))
        # Drawn in fours: a CPU takes about as long for 64 bits as for 16.
        fours = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
        fours.random_(-(2**63), None, generator=generator)
        return fours.view(torch.int16)[:count].view(len(one.moments), *one.parameter.shape)
