"""A compiled block is the eager block, gradients included. aot_eager traces as inductor does, and is fast."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models.attention import document_mask
from models.rotary import rotary_table
from tests.models.building import randn, scrambled, tiny


def gradients(block: nn.Module, documents: Tensor | None) -> dict[str, Tensor]:
    x = randn(2, 16, 32).requires_grad_()
    block.zero_grad()
    y = block(x, rotary_table(16, 8, 10000.0, x.device), document_mask(documents))
    (y * randn(2, 16, 32, seed=1)).sum().backward()
    assert x.grad is not None
    found = {name: parameter.grad for name, parameter in block.named_parameters()}
    return {"y": y.detach(), "x": x.grad} | {name: grad for name, grad in found.items() if grad is not None}


PLANS = ["dnt", "dyt", "derf", "isru", "deepnorm", "hybridnorm", "rezero", "fixup", "nf", "sigma-reparam"]


CASES = [
    pytest.param(plan, masked, marks=pytest.mark.survey if masked and plan not in ("dnt", "sigma-reparam") else ())
    for masked in (False, True)
    for plan in PLANS
]


@pytest.mark.parametrize(("plan", "masked"), CASES)
def test_compiled_block_equals_eager(plan: str, masked: bool) -> None:
    block = scrambled(tiny(plan=plan, kv_heads=2, depth=1)).blocks[0]
    documents = (torch.arange(16) // 5).expand(2, -1) if masked else None
    eager = gradients(block, documents)
    assert len(eager) == 2 + len(list(block.parameters()))
    torch.compiler.reset()
    block.compile(backend="aot_eager", fullgraph=True)
    # The traced graph decomposes norms and RoPE and reorders their sums: fp32 roundings of terms as large as a tensor's
    # largest element. What is one number (an alpha, a shift) is a sum over all tokens, of which little may be left.
    for name, found in gradients(block, documents).items():
        atol = 1e-5 * max(1.0, float(eager[name].abs().max()))
        torch.testing.assert_close(
            found, eager[name], atol=atol, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_blocks_share_their_code_however_deep() -> None:
    """nf has numbers of its own in every block, and torch gives up compiling after a few versions of one function."""
    blocks = scrambled(tiny(plan="nf", depth=12)).blocks
    torch.compiler.reset()
    made = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal made
        made += 1
        return graph

    table = rotary_table(16, 8, 10000.0, torch.device("cpu"))
    for block in blocks:
        block.compile(backend=count, fullgraph=True)
        x = randn(2, 16, 32)
        torch.testing.assert_close(block(x, table, None), type(block).forward(block, x, table, None))
    assert made <= 3
