"""What is trained: one transformer whose normalization is data. Pure PyTorch; opens no file, knows no rank."""

from models.config import ModelConfig
from models.errors import ConfigError
from models.plan import PLANS, SITES
from models.roles import ROLES, Role, parameter_roles
from models.transformer import Transformer

__all__ = ["PLANS", "ROLES", "SITES", "ConfigError", "ModelConfig", "Role", "Transformer", "parameter_roles"]
