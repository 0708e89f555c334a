"""train.kernels: training by Triton's programs, in its interpreter, is training by PyTorch's; and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models import kernels
from models.errors import ConfigError
from pretrain.engines import build_engine, fusing
from tests.interpreting import interpret_here, interpreted, needs_triton
from tests.pretrain.engine_runs import advance, config_of, here, train
from tests.ranks import run_ranks

STEPS = 2
TOLERANCE = 1e-5  # relative, of losses and gradient norms: fp32 in other orders, through two blocks and two steps
SMALL = {"model": {"depth": 2}}


def train_fused(
    plan: str, sections: dict[str, dict[str, Any]], backend: str | None = None
) -> list[tuple[float, float]]:
    config = config_of(plan, **(SMALL | sections | {"train": {"kernels": "triton"} | sections.get("train", {})}))
    torch.manual_seed(0)
    engine = build_engine(config, here())
    assert engine.describe()[-1] == "kernels: Triton, interpreted"
    if backend is not None:
        for block in engine.model.blocks:
            block.compile(backend=backend, fullgraph=True)
    engine.initialize()
    return advance(engine, config, range(STEPS))


def plain(plan: str, **sections: dict[str, Any]) -> list[tuple[float, float]]:
    return train(config_of(plan, **(SMALL | sections)), STEPS)


def assert_same(got: list[tuple[float, float]], expected: list[tuple[float, float]]) -> None:
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=TOLERANCE, atol=0)


@needs_triton
@pytest.mark.parametrize("plan", ["llama", "dnt", "dyt", "derf"])
def test_training(plan: str) -> None:
    assert_same(interpreted(train_fused, plan, {}), plain(plan))


@needs_triton
@pytest.mark.parametrize(("plan", "how"), [("dnt", "full"), ("dyt", "selective")])
def test_activation_checkpointing(plan: str, how: str) -> None:
    assert_same(interpreted(train_fused, plan, {"train": {"activation_checkpointing": how}}), plain(plan))


@needs_triton
def test_compiled_blocks() -> None:
    assert_same(interpreted(train_fused, "dnt", {}, "aot_eager"), plain("dnt"))


@needs_triton
def test_bf16() -> None:
    """The interpreter cuts bf16 off where others round: 2^-8 a value, which hardly shows in a mean over 128 tokens."""
    sections = {"precision": {"compute": "bf16"}}
    got, expected = interpreted(train_fused, "dyt", sections), plain("dyt", **sections)
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=2e-2, atol=0)


def _ranks(plan: str, sections: dict[str, dict[str, Any]]) -> list[tuple[float, float]]:
    interpret_here()
    return train_fused(plan, sections)


@needs_triton
@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"activation_checkpointing": "full"}},
        pytest.param({"parallel": {"engine": "deepspeed", "zero_stage": 3}}, marks=pytest.mark.survey),
    ],
)
def test_two_ranks(sections: dict[str, dict[str, Any]]) -> None:
    for got in run_ranks(_ranks, 2, "dnt", sections, timeout=120):
        assert_same(got, plain("dnt"))


def test_auto_on_a_cpu_is_torch() -> None:
    """Bit by bit and without a word about it."""
    engine = build_engine(config_of("dnt"), here())
    assert not any("kernels" in line for line in engine.describe())
    assert not any(getattr(module, "fused", False) for module in engine.model.modules())
    assert plain("dnt") == plain("dnt", train={"kernels": "torch"})


def test_triton_where_it_cannot_run() -> None:
    with pytest.raises(ConfigError, match=r"^train\.kernels triton needs .*, or write --train\.kernels torch$"):
        build_engine(config_of("dnt", train={"kernels": "triton"}), here())


@pytest.mark.parametrize(
    ("installed", "capability", "compiler", "need"),
    [
        (False, (9, 0), True, "Triton, which is not here: pip install triton"),
        (True, (7, 5), True, "compute capability 8.0, and this GPU has 7.5: take another"),
        (True, (9, 0), False, "gcc or clang, which is not here: install it"),
        (True, (9, 0), True, None),
    ],
)
def test_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: bool, capability: tuple[int, int], compiler: bool, need: str | None
) -> None:
    """auto takes what it can and says so; triton insists."""
    monkeypatch.setattr(kernels, "is_installed", lambda: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fusing, "missing_compiler", lambda device: None if compiler else "gcc or clang")
    model, gpu = torch.nn.ModuleDict(), torch.device("cuda", 0)
    if need is None:
        assert (
            fusing.fuse_kernels(model, "auto", gpu) == fusing.fuse_kernels(model, "triton", gpu) == ["kernels: Triton"]
        )
        return
    assert fusing.fuse_kernels(model, "auto", gpu) == [f"kernels: PyTorch's; Triton's need {need}"]
    with pytest.raises(ConfigError) as refused:
        fusing.fuse_kernels(model, "triton", gpu)
    assert str(refused.value) == f"train.kernels triton needs {need}, or write --train.kernels torch"
