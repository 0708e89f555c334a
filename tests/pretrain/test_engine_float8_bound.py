"""8-bit inputs scaled by DyT's bound: the bound is one, the rounding is that by hand, and training stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from models.elementwise import Elementwise
from models.errors import ConfigError
from models.norms import NORMS, build_norm
from pretrain.batch import make_batch
from pretrain.config import RunConfig
from pretrain.engines import build_engine
from pretrain.engines.float8_bound import largest_output
from tests.pretrain.engine_runs import batch_of, config_of, here, train, train_all
from tests.pretrain.test_engine_combinations import train_compiled
from tests.ranks import run_ranks

FUNCTIONS = [name for name, of in NORMS.items() if issubclass(of, Elementwise)]


def config(plan: str = "dyt", scale: str = "bound", **more: Any) -> RunConfig:
    precision = {"compute": "bf16", "fp8": "tensorwise", "fp8_input_scale": scale} | more.pop("precision", {})
    return config_of(plan, precision=precision, **more)


@given(
    st.sampled_from(FUNCTIONS),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    st.lists(st.floats(-10, 10, width=32), min_size=8, max_size=8),
)
def test_a_bound_is_never_exceeded(name: str, x: list[float], numbers: list[float]) -> None:
    norm = build_norm(name, 4, {"eps": 1e-5, "alpha": 3.0, "beta": True}, "attn_in")
    assert isinstance(norm, Elementwise)
    assert norm.bounded == (name != "identity")
    with torch.no_grad():
        norm.get_parameter("weight").copy_(torch.tensor(numbers[:4]))
        norm.get_parameter("bias").copy_(torch.tensor(numbers[4:]))
        found = norm(torch.tensor(x)).abs().max()
        if norm.bounded:
            assert found <= largest_output(norm, torch.device("cpu")) * (1 + 1e-6)  # of fp32's own rounding


def test_without_a_gain_it_is_one() -> None:
    norm = build_norm("dyt", 4, {"eps": 1e-5, "gain": False}, "attn_in")
    assert isinstance(norm, Elementwise)
    assert largest_output(norm, torch.device("cpu")).item() == 1


def test_linears_read_what_was_rounded_by_hand() -> None:
    """Once for all readers, with 448 (the largest e4m3 number) over the bound; a norm beside it stays dynamic."""
    sites = {"mlp_in": {"function": "dyt", "beta": True}, "mlp_mid": "rmsnorm"}
    engine = build_engine(config(model={"sites": sites}), here())
    engine.initialize()
    block: Any = engine.model.get_submodule("blocks.1")
    torch.manual_seed(0)
    with torch.no_grad():
        block.mlp_in.weight.normal_(std=2.0)
        block.mlp_in.bias.normal_()
        block.mlp_in.alpha.fill_(0.1)
    written: list[Tensor] = []
    read: dict[str, Any] = {}
    block.mlp_in.register_forward_hook(lambda *call: written.append(call[2]))
    for name in ("gate", "up", "down"):
        linear: nn.Module = getattr(block.feedforward, name)
        linear.register_forward_pre_hook(lambda _, inputs, name=name: read.update({name: inputs[0]}))
    engine.evaluate(make_batch(batch_of(0), 0, False))
    assert read["gate"] is read["up"]
    assert type(read["down"]) is Tensor, "what RMSNorm writes has no bound worth the name"
    bound = (block.mlp_in.weight.abs() + block.mlp_in.bias.abs()).max()
    scale = read["up"]._scale.double()
    assert scale.item() == pytest.approx(448 / bound.item(), rel=1e-6)
    (y,) = written
    # A pass over the data would have found another: it is not what is used.
    assert y.abs().max() < 0.99 * bound
    by_hand = (y.float() * scale.float()).to(torch.float8_e4m3fn).double() / scale
    torch.testing.assert_close(read["up"]._data.double() / scale, by_hand, atol=0, rtol=0)
    assert ((by_hand - y.double()).abs() <= 2**-4 * y.double().abs() + 2**-10 / scale).all(), "e4m3's own steps"


def test_training_is_that_of_dynamic_scales() -> None:
    """Other scales round other values up, by 2^-4 at most; the largest difference seen is 0.2 %."""
    dynamic, bound = (train(config(scale=scale), 10) for scale in ("dynamic", "bound"))
    assert bound != dynamic
    assert bound == [pytest.approx(step, rel=0.02) for step in dynamic]


def test_recomputing_and_tracing_change_no_bit() -> None:
    expected = train(config(), 3)
    assert train(config(train={"activation_checkpointing": "selective"}), 3) == expected
    assert train_compiled({"": config(train={"compile": True})}, 3)[""] == expected


@pytest.mark.drill
@pytest.mark.parametrize("parallel", [{}, {"engine": "deepspeed", "zero_stage": 3}], ids=["FSDP2", "ZeRO-3"])
def test_two_ranks_train_alike(parallel: dict[str, Any]) -> None:
    """Gains are whole where their bound is read; a rank's rows are rounded as those of one process are."""
    expected = train(config(), 5)
    for found in run_ranks(train_all, 2, {"": config(parallel=parallel)}, 5, timeout=150):
        assert found[""] == [pytest.approx(step, rel=0.02) for step in expected]


def test_the_start_of_a_run_says_so() -> None:
    lines = build_engine(config("dyt", precision={"fp8_skip": ["attention.k"]}), here()).describe()
    assert "  inputs of 6 of them are scaled by their bound, without a look at the data" in lines
    assert not any("bound" in line for line in build_engine(config(scale="dynamic"), here()).describe())
    (line,) = (line for line in build_engine(config(precision={"fp8": "none"}), here()).describe() if "fp8" in line)
    assert line == "precision.fp8_input_scale does nothing where precision.fp8 is none"


@pytest.mark.parametrize(
    ("plan", "precision", "words"),
    [
        ("llama", {}, "no bounded function"),
        ("identity", {}, "no bounded function"),
        ("dyt", {"fp8": "rowwise"}, "write --precision.fp8 tensorwise"),
        ("dyt", {"fp8_skip": ["attention.q", "feedforward.up"]}, "fewer precision.fp8_skip"),
    ],
)
def test_where_there_is_no_bound(plan: str, precision: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build_engine(config(plan, precision=precision), here())
