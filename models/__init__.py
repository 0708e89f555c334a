"""What is trained: one transformer whose normalization is data. Pure PyTorch; opens no file, knows no rank."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.config import ModelConfig
    from models.errors import ConfigError
    from models.failures import known_failures
    from models.plan import PLANS, SITES
    from models.roles import ROLES, Role, parameter_roles
    from models.transformer import Transformer

__all__ = [
    "PLANS",
    "ROLES",
    "SITES",
    "ConfigError",
    "ModelConfig",
    "Role",
    "Transformer",
    "known_failures",
    "parameter_roles",
]

_HOMES = {
    "config": ["ModelConfig"],
    "errors": ["ConfigError"],
    "failures": ["known_failures"],
    "plan": ["PLANS", "SITES"],
    "roles": ["ROLES", "Role", "parameter_roles"],
    "transformer": ["Transformer"],
}


def __getattr__(name: str) -> Any:
    """Each from its home at its first use: a configuration can be read, and a mistake in it answered, without torch,
    which takes seconds to import."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"models.{home}"), name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
