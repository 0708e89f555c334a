"""Number formats and rounding to them, simulated: values on a format's grid, held in fp32.

``torchao`` has the same arithmetic for linears as they are on the devices that multiply in 8 bits; here it is needed on
any device, for every way of scaling, and for linears that make their weight anew (models/weights.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.errors import ConfigError, nearest


class Format(NamedTuple):
    """A grid of numbers, symmetric about zero."""

    largest: float | None  # what the largest magnitude is scaled to; None: no scale
    dtype: torch.dtype | None  # whose rounding it is; None: to integers


FORMATS = {
    "int8": Format(127, None),  # -128 is left out, so that the grid is symmetric
    "fp8": Format(448, torch.float8_e4m3fn),  # both of arXiv 2209.05433
    "fp8-e5m2": Format(57344, torch.float8_e5m2),
    "int4": Format(7, None),
    "bf16": Format(None, torch.bfloat16),  # has fp32's range
}
REFERENCE = "bf16"
DEFAULT = ("int8", "fp8", "fp8-e5m2")


def fake_quantize(x: Tensor, format: Format, per_row: bool) -> Tensor:
    """``x`` [..., rows, columns] with every value at the nearest one of the format's grid, in the dtype of ``x``.

    The grid is scaled so that its largest number is the largest magnitude of a row (a weight's output channel, a
    token's activations), or else of all rows together: of a weight, or of one sequence's activations::

        scale = max |x| / largest        x -> scale * round(x / scale)

    A row of zeros stays as it is.
    """
    largest, dtype = format
    if largest is None:
        return x.to(dtype).to(x.dtype)
    scale = x.abs().amax(dim=-1 if per_row else (-2, -1), keepdim=True) / largest
    scale = scale.where(scale > 0, 1)
    # Scales of subnormal tensors are coarse: quotients may lie beyond the largest number, where casts give NaN or inf.
    scaled = (x / scale).clamp(-largest, largest)
    return scale * (scaled.round() if dtype is None else scaled.to(dtype).to(x.dtype))


class Treatment(NamedTuple):
    """What is done to a linear: its weight is rounded to a format, and the activations it reads, or not."""

    format: str
    activations: bool
    per_row: bool

    @property
    def name(self) -> str:
        """As the command line and results.json have it."""
        parts = [self.format, "wa" if self.activations else "w"]
        if FORMATS[self.format].largest is not None:
            parts.append("row" if self.per_row else "tensor")
        return "-".join(parts)

    def round(self, x: Tensor) -> Tensor:
        return fake_quantize(x, FORMATS[self.format], self.per_row)


def treatments(formats: Sequence[str]) -> list[Treatment]:
    """The rows of the table: bf16 as a reference, then every format four times."""
    scaled = [name for name in formats if name != REFERENCE]
    reference = [Treatment(REFERENCE, activations, per_row=False) for activations in (False, True)]
    return reference + [
        Treatment(name, activations, per_row)
        for name in scaled
        for activations in (False, True)
        for per_row in (False, True)
    ]


def parse_formats(text: str) -> list[str]:
    """Names with commas between them, each once. ConfigError for one that is none."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in FORMATS:
            raise ConfigError(f"--formats: {name!r} is no format: {nearest(name, FORMATS)}")
    if not names:
        raise ConfigError(f"--formats names none: write some of {', '.join(FORMATS)} with commas between them")
    return names


def parse_treatment(text: str) -> Treatment:
    """The treatment of this name. ConfigError if there is none."""
    known = {treatment.name: treatment for treatment in treatments(list(FORMATS))}
    if text not in known:
        raise ConfigError(f"--layers: {text!r} is no treatment: {nearest(text, known)}")
    return known[text]
