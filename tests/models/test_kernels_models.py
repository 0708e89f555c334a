"""Models whose modules compute through the fused operators, here by the twins: what they compute, and who sees it.

That Triton's programs compute the same is tests/pretrain/test_engine_kernels.py's.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from models import PLANS, Transformer, kernels
from models.transformer import Cache
from pretrain.telemetry.attention import record_attention
from pretrain.telemetry.sites import record_saturation, record_sites
from tests.models.building import scrambled, tiny, tokens


class Operators(TorchDispatchMode):
    """Counts calls of operators of this namespace, and of PyTorch's own that the kernels replace."""

    def __init__(self) -> None:
        super().__init__()
        self.ours: dict[str, int] = {}
        self.replaced: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if func.namespace == "equipoise":
            self.ours[name] = self.ours.get(name, 0) + 1
        elif name in ("tanh", "erf", "silu", "native_layer_norm_backward", "linalg_vector_norm", "cat"):
            self.replaced.add(name)
        return func(*args, **(kwargs or {}))


def both(**config: Any) -> tuple[Transformer, Transformer]:
    plain, fused = (scrambled(tiny(kv_heads=2, **config)) for _ in range(2))
    kernels.fuse(fused)
    assert list(fused.state_dict()) == list(plain.state_dict())
    return plain, fused


def step(model: Transformer) -> dict[str, Tensor]:
    model.zero_grad()
    targets = tokens(seed=1)
    targets[0, :3] = kernels.IGNORE
    objective, nll = model(tokens(), targets, z_loss=1e-3, loss_chunk=7)
    objective.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"objective": objective.detach(), "nll": nll} | {k: g for k, g in grads.items() if g is not None}


@pytest.mark.parametrize("plan", PLANS)
def test_fused_model_computes_the_same(plan: str) -> None:
    plain, fused = both(plan=plan)
    got, expected = step(fused), step(plain)
    assert set(got) == set(expected)
    for name, tensor in expected.items():  # fp32 and its sums in other orders, through two blocks
        assert (got[name] - tensor).norm() <= 3e-5 * tensor.norm(), name


@pytest.mark.parametrize(
    ("changes", "forward"),
    [
        ({"plan": "llama"}, {"rms_norm": 3, "add_rms_norm": 2, "rotate": 4, "silu_mul": 2}),
        ({"plan": "dnt"}, {"rms_norm": 4, "rms_norm_add": 4, "rotate": 4, "silu_mul": 2}),
        ({"plan": "peri"}, {"rms_norm": 4, "add_rms_norm": 2, "rms_norm_add": 2, "rotate": 4, "silu_mul": 2}),
        ({"plan": "dyt"}, {"dyt": 3, "add_dyt": 2, "rotate": 4, "silu_mul": 2}),
        ({"plan": "derf", "trunk": "gpt"}, {"dyt": 3, "add_dyt": 2}),
        ({"plan": "isru"}, {"rotate": 4, "silu_mul": 2}),
        ({"plan": "dyt", "dropout": 0.1}, {"dyt": 5, "rotate": 4, "silu_mul": 2}),
    ],
)
def test_what_is_fused(changes: dict[str, Any], forward: dict[str, int]) -> None:
    """Two blocks, 32 tokens in chunks of 7. Each operator has one backward a call, the norm of the sum two where the
    branch has one as well."""
    with Operators() as seen:
        step(both(**changes)[1])
    assert {name: n for name, n in seen.ours.items() if not name.endswith("_backward")} == {
        **forward,
        "cross_entropy_": 5,
    }
    backward = sum(n for name, n in seen.ours.items() if name.endswith("_backward"))
    assert backward == sum(forward.values()) + (2 if changes["plan"] == "peri" else 0)
    assert seen.replaced <= ({"linalg_vector_norm"} if "trunk" not in changes else {"tanh"}), "gelu is torch's"


def test_a_model_that_is_not_fused_meets_no_operator() -> None:
    with Operators() as seen:
        step(both(plan="dnt")[0])
    assert not seen.ours


@pytest.mark.parametrize("plan", ["dnt", pytest.param("dyt", marks=pytest.mark.survey)])
def test_blocks_compile_without_a_break(plan: str) -> None:
    _, fused = both(plan=plan, depth=1)
    eager = step(fused)
    torch.compiler.reset()
    fused.blocks[0].compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(step(fused), eager, rtol=1e-5, atol=1e-6)
    torch.compiler.reset()


def test_telemetry_sees_what_it_saw() -> None:
    """Sites, saturation, attention: what hooks get is the module's own input and output, also where a fused pass would
    go around the module."""
    for changes in ({"plan": "dyt"}, {"plan": "dnt"}, {"plan": "dnt", "sites": {"query": "dyt", "mlp_out": "dyt"}}):
        plain, fused = both(**changes)
        for record in (record_sites, record_saturation, record_attention):
            with record(plain) as expected:
                step(plain)
            with record(fused) as got:
                step(fused)
            assert set(got) == set(expected)
            assert record is record_attention or "dyt" not in str(changes) or got
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_every_site_is_called_under_a_hook() -> None:
    _, fused = both(plan="peri", sites={"query": "rmsnorm", "key": "rmsnorm"})
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, output, name=name: called.append(name))
        for name, module in fused.named_modules()
        if hasattr(module, "eps")
    ]
    expected = step(both(plan="peri", sites={"query": "rmsnorm", "key": "rmsnorm"})[0])
    torch.testing.assert_close(step(fused), expected, rtol=1e-4, atol=2e-5)
    assert sorted(called) == sorted(name for name, module in fused.named_modules() if hasattr(module, "eps"))
    for handle in handles:
        handle.remove()


def test_generation_goes_on() -> None:
    """With a cache rows have positions of their own."""
    plain, fused = both(plan="dnt")
    padding = torch.tensor([0, 2])
    logits = [model.eval().extend(tokens(length=5), Cache(model.config, padding, 16)) for model in (plain, fused)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


def test_without_kernels_triton_is_not_imported() -> None:
    program = (
        "import sys, torch, models.kernels, models.transformer, models.initialization\n"
        "assert 'triton' not in sys.modules\n"
        "from tests.models.building import build, tiny, tokens\n"
        "build(tiny())(tokens(), tokens())[0].backward()\n"
        "assert 'triton' not in sys.modules and not any(m.startswith('models.kernels.jit') for m in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
