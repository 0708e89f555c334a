"""DyT's kernel that writes the 8-bit input itself: who takes that path, and that training stays the same on it.

Here by the operators' twins, but for what Triton's programs compute in the interpreter.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import kernels
from pretrain.batch import make_batch
from pretrain.config import RunConfig
from pretrain.engines import build_engine
from pretrain.engines.float8_bound import largest_output
from tests.interpreting import interpreted, needs_triton
from tests.pretrain.engine_runs import advance, batch_of, config_of, here, train

Steps = list[tuple[float, float]]


def config(plan: str = "dyt", compute: str = "fp32", **train: Any) -> RunConfig:
    precision = {"compute": compute, "fp8": "tensorwise", "fp8_input_scale": "bound"}
    return config_of(plan, model={"depth": 2}, precision=precision, train=train)


def fused(run: RunConfig) -> Any:
    """An engine whose operators are the twins."""
    torch.manual_seed(0)
    engine: Any = build_engine(run, here())
    kernels.fuse(engine.model)
    engine.initialize()
    return engine


def assert_same(got: Steps, expected: Steps) -> None:
    """Both round from fp32. Of some 10^4 values hardly one lies so close to the middle of two 8-bit numbers that fp32's
    noise decides which it becomes; it would be off by 2^-4."""
    torch.testing.assert_close(torch.tensor(got), torch.tensor(expected), rtol=1e-4, atol=0)


@needs_triton
@pytest.mark.parametrize(("plan", "how"), [("dyt", "none"), ("derf", "full")])
def test_training_by_triton(plan: str, how: str) -> None:
    """With full activation checkpointing, too, and with erf, shift and beta."""
    run = config(plan, kernels="triton", activation_checkpointing=how)
    assert_same(interpreted(train, run, 2), train(config(plan), 2))


def test_in_bf16_a_rounding_is_saved() -> None:
    """Unfused, values are rounded to bf16 on their way to 8 bits, which moves some of them by 2^-3, a step of these;
    the tolerance is that of other scales, which move more of them (test_engine_float8_bound.py)."""
    run = config(compute="bf16")
    got, expected = advance(fused(run), run, range(5)), train(run, 5)
    assert got != expected
    assert got == [pytest.approx(step, rel=0.02) for step in expected]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the hooks before the readers round."""
    from torchao.float8 import float8_training_tensor as torchao

    seen: list[Tensor] = []
    convert = torchao.hp_tensor_and_scale_to_float8

    def counted(x: Tensor, *others: Any) -> Any:
        seen.append(x)
        return convert(x, *others)

    monkeypatch.setattr(torchao, "hp_tensor_and_scale_to_float8", counted)
    return seen


def test_readers_get_what_the_kernel_rounded(conversions: list[Tensor]) -> None:
    """Once, from fp32, for all of them, alone (attn_in) and behind the addition (mlp_in); watched, by the hook."""
    engine = fused(config(compute="bf16"))
    block = engine.model.blocks[1]
    linears = {
        "q": block.attention.q,
        "v": block.attention.v,
        "gate": block.feedforward.gate,
        "up": block.feedforward.up,
    }
    with torch.no_grad():
        block.mlp_in.weight.copy_(torch.linspace(0.5, 2.0, 32))
    read: dict[str, Any] = {}
    for name, linear in linears.items():
        linear.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    batch = make_batch(batch_of(0), 0, False)
    engine.evaluate(batch)
    assert not conversions
    assert read["q"] is read["v"]
    assert read["gate"] is read["up"]
    entered: list[Tensor] = []
    block.mlp_in.register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0]))
    kernel = dict(read)
    engine.evaluate(batch)
    assert len(conversions) == 1, "mlp_in's, which is watched"
    (x,), norm = entered, block.mlp_in
    scale = kernel["up"]._scale
    assert scale == 448 / largest_output(norm, x.device)
    y = (norm.weight.double() * torch.tanh(norm.alpha.double() * x.double())).detach()
    assert (kernel["up"]._data.float() == (y * scale).float().to(torch.float8_e4m3fn).float()).float().mean() > 0.999
    assert (kernel["up"]._data.float() != read["up"]._data.float()).any(), "of what was rounded to bf16 before"


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, None)], ids=["added", "alone"])
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_are_those_without_the_rounding(
    dtypes: tuple[torch.dtype, torch.dtype | None], learned: bool
) -> None:
    from torchao.float8.float8_training_tensor import LinearMMConfig

    from pretrain.engines.float8_dyt import Float8DyT

    torch.manual_seed(0)
    x, *branches = [torch.randn(4, 6).to(dtype).requires_grad_() for dtype in dtypes if dtype is not None]
    alpha, gain, beta, shift = (nn.Parameter(torch.randn(n)) for n in (1, 6, 6, 1))
    settings: Any = (alpha, gain, beta, shift, "erf") if learned else (0.8, None, None, None, "tanh")
    inputs = [x, *branches, *([alpha, gain, beta, shift] if learned else [])]
    grads = [torch.randn(4, 6) for _ in branches] + [torch.randn(4, 6).to(x.dtype)]
    expected = kernels.add_dyt(x, branches[0], *settings) if branches else kernels.dyt(x, *settings)
    branch, scale = branches[0] if branches else None, torch.tensor(100.0)
    got: Any = Float8DyT.apply(x, branch, scale, *settings, LinearMMConfig())
    assert (got[-1] if branches else got).dtype == x.dtype
    found, wanted = (torch.autograd.grad(outputs, inputs, grads) for outputs in (got, expected))
    assert all(map(torch.equal, found, wanted))


def test_one_graph_for_all_blocks() -> None:
    from torch._dynamo.utils import counters

    run = config()
    eager = advance(fused(run), run, range(1))
    torch.compiler.reset()
    counters.clear()
    engine = fused(run)
    for block in engine.model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert_same(advance(engine, run, range(1)), eager)
    assert counters["stats"]["unique_graphs"] == 1
    torch.compiler.reset()
