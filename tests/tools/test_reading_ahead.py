"""Tensors read ahead: each is right when it is handed out, and only one more is in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models.errors import ConfigError
from tools.formats.lazy import LazyTensor, in_file, memory_of
from tools.formats.writing import read_ahead

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8]
SHAPES = st.lists(st.integers(0, 40), max_size=3).map(tuple) | st.just(((1 << 20) + 3,))  # more than a portion


@settings(max_examples=60, deadline=None)
@given(kinds=st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES), st.booleans(), st.booleans()), max_size=6))
def test_values_and_order(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[tuple[int, ...], torch.dtype, bool, bool]]
) -> None:
    """Of tensors in files and others, as they are and in fp32 where that holds them, empty ones and single numbers."""
    path = tmp_path_factory.mktemp("tensors") / "file"
    wanted: list[tuple[LazyTensor, torch.dtype]] = []
    expected: list[Tensor] = []
    with path.open("wb") as file:
        for shape, dtype, stored, widen in kinds:
            values = torch.randint(0, 255, shape).to(dtype)
            out = torch.float32 if widen and dtype in (torch.bfloat16, torch.float16) else dtype
            expected.append(values.to(out))
            if stored:
                wanted.append((in_file(path, file.tell(), shape, dtype), out))
                file.write(memory_of(values))
            else:
                wanted.append((LazyTensor(shape, dtype, values.clone), out))
    for tensor, values in zip(read_ahead(wanted), expected, strict=True):
        assert (tensor.shape, tensor.dtype) == (values.shape, values.dtype)
        assert tensor.equal(values)
        assert tensor.untyped_storage().nbytes() == values.nbytes, "DCP would copy it"


def counted(count: int, reads: list[int]) -> Iterator[tuple[LazyTensor, torch.dtype]]:
    def read(number: int) -> Tensor:
        reads.append(number)
        return torch.full((3,), float(number))

    for number in range(count):
        yield LazyTensor((3,), torch.float32, lambda number=number: read(number)), torch.float32  # type: ignore[misc]


def test_one_more_is_read_and_no_other() -> None:
    reads: list[int] = []
    places = set()
    for number, tensor in enumerate(read_ahead(counted(9, reads))):
        assert tensor.tolist() == [number] * 3
        assert len(reads) in (number + 1, number + 2)
        places.add(tensor.data_ptr())
    assert reads == list(range(9))
    assert len(places) == 2


def test_an_error_is_raised_when_its_tensor_is_asked_for() -> None:
    def fail() -> Tensor:
        raise ConfigError("the file ends: get it again")

    good = LazyTensor((2,), torch.float32, lambda: torch.ones(2))
    tensors = read_ahead((one, torch.float32) for one in (good, LazyTensor((2,), torch.float32, fail)))
    assert next(tensors).tolist() == [1, 1]
    with pytest.raises(ConfigError, match="the file ends"):
        next(tensors)


def test_what_would_be_rounded_is_refused() -> None:
    wide = LazyTensor((2,), torch.float64, lambda: torch.ones(2, dtype=torch.float64))
    with pytest.raises(AssertionError):
        next(read_ahead([(wide, torch.float32)]))
