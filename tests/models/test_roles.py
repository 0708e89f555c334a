"""Every parameter of every plan has the right role, told here from its name alone."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from models import PLANS, parameter_roles
from tests.models.building import build, tiny

RULES = [
    (r"(embedding|positions)\.weight", "embedding"),
    (r"head\.weight", "head"),
    (r"embedding_scale", "scale"),
    (r"blocks\.\d+\.(attention|feedforward)\.\w+\.gain", "gain"),  # of a linear's weight
    (r"blocks\.\d+\.residual\.(both|attn|mlp)", "scale"),
    (r"blocks\.\d+\.(attention\.(q|k|v|out)|feedforward\.(gate|up|down))\.weight", "matrix"),
    (r"blocks\.\d+\.(attention\.(q|k|v|out)|feedforward\.(gate|up|down))\.bias", "bias"),
    (r".*\.alpha", "alpha"),
    (r".*\.shift", "shift"),
    (r".*\.bias", "shift"),  # what a norm adds
    (r".*\.weight", "gain"),
]


def expected(name: str) -> str:
    return next(role for pattern, role in RULES if re.fullmatch(pattern, name))


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize(("trunk", "tied"), [("llama", False), ("llama", True), ("gpt", True), ("gpt", False)])
@pytest.mark.parametrize("bias", [False, True])
def test_every_plan(plan: str, trunk: str, tied: bool, bias: bool) -> None:
    model = build(tiny(plan=plan, trunk=trunk, tied=tied, bias=bias))
    roles = parameter_roles(model)
    assert list(roles) == [name for name, _ in model.named_parameters()]
    assert roles == {name: expected(name) for name in roles}
    assert ("head" in roles.values()) == (not tied)


def test_a_parameter_without_a_role_is_refused() -> None:
    model = build(tiny())
    model.blocks[0].secret = nn.Parameter(torch.zeros(1))
    with pytest.raises(AssertionError, match=r"blocks\.0\.secret"):
        parameter_roles(model)
