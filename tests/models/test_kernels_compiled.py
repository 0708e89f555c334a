"""Every launch compiles for the GPUs that pretraining runs on, on a machine without one.

What is compiled is what the operators launch: their arguments, in their order, and their choice of tiles.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models import kernels
from models.kernels import launching
from tests.interpreting import needs_triton
from tests.models.kernel_cases import CASES, HEAD_CASES, inputs, results

WIDTH, HEADS, HEAD_WIDTH, VOCABULARY = 1536, 6, 64, 32000
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int64: "*i64", torch.float8_e4m3fn: "*fp8e4nv"}

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]  # program, arguments, settings


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[[], object]], list[Launch]]:
    """What a function would launch on a GPU. Nothing is computed."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")  # some versions warn if it is not said
    seen: list[Launch] = []

    class Program:
        def __init__(self, home: str, name: str) -> None:
            self.program = getattr(importlib.import_module(f"models.kernels.jit.{home}"), name)

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert all(size > 0 for size in grid)
            assert max(grid[1:], default=1) < 2**16, "CUDA's limit"
            return lambda *args, **settings: seen.append((self.program, args, settings))

    for home in ("dyt", "rms", "rotary", "swiglu", "cross_entropy"):
        module = importlib.import_module(f"models.kernels.{home}")
        monkeypatch.setattr(module, "kernel", Program)
        monkeypatch.setattr(module, "runs_triton", lambda x, whole_rows=False: True)

    def run(function: Callable[[], object]) -> list[Launch]:
        seen.clear()
        function()
        return list(seen)

    return run


def source(launch: Launch) -> tuple[Any, dict[str, int]]:
    """As Triton's launcher has it: None and settings are constants, what 16 divides is known to be so."""
    from triton.compiler import ASTSource

    program, args, settings = launch
    signature, constants, attributes = {}, {}, {}
    options = {"num_warps": settings["num_warps"]}
    for index, (parameter, value) in enumerate(zip(program.params, args, strict=False)):
        divisible = isinstance(value, Tensor)
        if value is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", None
        elif isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        elif isinstance(value, int):
            signature[parameter.name] = "i32"
            divisible = value % 16 == 0 and not parameter.do_not_specialize
        else:
            assert isinstance(value, float)
            signature[parameter.name] = "fp32"
        if divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    for name, value in settings.items():
        if name != "num_warps":
            signature[name], constants[name] = "constexpr", value
    assert set(signature) == {parameter.name for parameter in program.params}
    return ASTSource(fn=program, signature=signature, constexprs=constants, attrs=attributes), options


PROGRAMS = ("add-dyt", "rms-add-rms", "swiglu", "rms-rotate")  # with cross-entropy's, each of them once
FORMS = ("add-derf", "rms-add", "rotate")


def run(names: tuple[str, ...]) -> None:
    for name in names:
        heads = name in HEAD_CASES
        case = (CASES | HEAD_CASES)[name]
        results(case.ours, inputs(case, (2, 32, HEADS, HEAD_WIDTH) if heads else (2, 32, WIDTH), torch.bfloat16))
    logits = torch.zeros(4, VOCABULARY, dtype=torch.bfloat16)
    kernels.cross_entropy_(logits, torch.zeros(4, dtype=torch.int64), 1e-4, True)


@needs_triton
@pytest.mark.skipif(kernels.is_interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize(("capability", "names"), [(80, PROGRAMS), (90, PROGRAMS + FORMS), (100, PROGRAMS)])
def test_compiles(
    capability: int, names: tuple[str, ...], launches: Callable[[Callable[[], object]], list[Launch]]
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    seen = launches(lambda: run(names))
    assert len({program.__name__ + program.__module__ for program, _, _ in seen}) == 9, "all there are"
    for launch in seen:
        made, options = source(launch)
        compiled = triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options)
        assert len(compiled.asm["cubin"]) > 1000
        assert "v4.b32" in compiled.asm["ptx"], "memory is moved in pieces of 16 bytes"


@needs_triton
@pytest.mark.skipif(kernels.is_interpreted(), reason="TRITON_INTERPRET is set")
@pytest.mark.parametrize("capability", [90, 100])
def test_e4m3_compiles(capability: int, launches: Callable[[Callable[[], object]], list[Launch]]) -> None:
    """On GPUs that multiply it. Nothing of higher precision is stored, but the stream where there is a branch."""
    import triton
    from triton.backends.compiler import GPUTarget

    x, branch = (torch.zeros(64, WIDTH, dtype=torch.bfloat16) for _ in range(2))
    gain, beta, scale = torch.ones(WIDTH), torch.zeros(WIDTH), torch.ones(())
    seen = launches(
        lambda: [
            kernels.dyt_e4m3(x, None, scale, scale[None], gain),
            kernels.dyt_e4m3(x, branch, scale, 0.8, gain, beta, scale[None], "erf"),
        ]
    )
    assert len(seen) == 2
    for stored, launch in zip((1, 3), seen, strict=True):  # bytes of an element
        made, options = source(launch)
        ptx = triton.compile(made, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]
        assert "cvt.rn.satfinite.e4m3x2.f32" in ptx
        sizes = re.findall(r"st\.global(?:\.v(\d))?\.b(\d+)", ptx)
        a_thread = sum(int(count or 1) * int(bits) for count, bits in sizes) // 8
        assert a_thread == stored * 4096 // (32 * options["num_warps"])


@needs_triton
@pytest.mark.skipif(kernels.is_interpreted(), reason="TRITON_INTERPRET is set")
def test_another_number_of_rows_compiles_nothing(launches: Callable[[Callable[[], object]], list[Launch]]) -> None:
    def key(rows: int) -> list[Any]:
        case, heads = CASES["add-derf"], HEAD_CASES["rms-rotate"]
        seen = launches(
            lambda: (
                results(case.ours, inputs(case, (2, rows, WIDTH), torch.bfloat16)),
                results(heads.ours, inputs(heads, (2, rows, HEADS, HEAD_WIDTH), torch.bfloat16)),
                kernels.cross_entropy_(torch.zeros(rows, VOCABULARY), torch.zeros(rows, dtype=torch.int64), 0.0, True),
            )
        )
        return [(made.signature, made.constants, made.attrs) for made, _ in map(source, seen)]

    assert key(1) == key(16) == key(33)


def test_tiles() -> None:
    """Powers of 2, as many elements as asked for, within a row's columns."""
    assert launching.tile(4096, 2048) == (1, 4096)
    assert launching.tile(37, 2048) == (32, 64)
    assert launching.tile(5000, 4096, 1024) == (4, 1024)
    assert launching.tile(1, 2048) == (2048, 1)
    assert [launching.power_of_two(n) for n in (0, 1, 2, 3, 64, 65)] == [1, 1, 2, 4, 64, 128]
    assert [launching.warps(n) for n in (64, 2048, 4096, 8192, 32768)] == [4, 4, 8, 16, 16]
