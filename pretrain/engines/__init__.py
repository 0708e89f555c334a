"""Whatever holds the model stands behind one narrow protocol."""

from torch import nn

from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.engines.compiling import require_compiler
from pretrain.engines.fsdp import FSDPEngine
from pretrain.engines.model import ModelEngine
from pretrain.engines.protocol import Engine


def check_engine(config: RunConfig, world: World) -> nn.Module:
    """What can be wrong on one rank alone, as a missing package or compiler, or on all: ConfigError, before engines
    begin with collectives. Returns the model, on the meta device."""
    if config.parallel.engine == "deepspeed":
        from pretrain.engines.deepspeed import import_deepspeed

        import_deepspeed(world)
    return ModelEngine(config, world).model


def build_engine(config: RunConfig, world: World) -> Engine:
    """The engine that ``parallel.engine`` names, its model still without values."""
    if config.parallel.engine == "deepspeed":
        from pretrain.engines.deepspeed import DeepSpeedEngine  # an optional package, and seconds to import

        return DeepSpeedEngine(config, world)
    return FSDPEngine(config, world)


__all__ = ["Engine", "build_engine", "check_engine", "require_compiler"]
