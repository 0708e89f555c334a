"""Every parameter has a role, and the role, never the shape, decides its treatment.

Initialization, optimizer groups, weight decay, learning-rate factors and telemetry all read this one table. A
module that owns parameters directly declares them: ``roles = {"weight": "gain"}``.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

Role = Literal["embedding", "head", "matrix", "bias", "gain", "shift", "alpha", "scale"]
ROLES: tuple[Role, ...] = get_args(Role)

_TORCH_MODULES: dict[type[nn.Module], dict[str, Role]] = {
    nn.Linear: {"weight": "matrix", "bias": "bias"},
    nn.Embedding: {"weight": "embedding"},
}


def parameter_roles(model: nn.Module) -> dict[str, Role]:
    """Parameter name -> role, in the order of ``model.named_parameters()``.

    An outer module's declaration (``"head.weight": "head"``) overrides an inner one's.
    """
    declared: dict[str, Role] = {}
    for prefix, module in model.named_modules():
        table: dict[str, Role] = dict(getattr(module, "roles", {}))
        for kind, roles in _TORCH_MODULES.items():
            if isinstance(module, kind):
                table = roles | table
        for name, role in table.items():
            declared.setdefault(f"{prefix}.{name}" if prefix else name, role)
    names = [name for name, _ in model.named_parameters()]
    missing = [name for name in names if name not in declared]
    assert not missing, f"parameters without a role: {missing}"
    return {name: declared[name] for name in names}
