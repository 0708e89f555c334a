"""Whatever holds the model stands behind one narrow protocol."""

from pretrain.config import RunConfig
from pretrain.distributed import World
from pretrain.engines.compiling import require_compiler
from pretrain.engines.fsdp import FSDPEngine
from pretrain.engines.protocol import Engine


def build_engine(config: RunConfig, world: World) -> Engine:
    """The engine that ``parallel.engine`` names, its model still without values."""
    if config.parallel.engine == "deepspeed":
        from pretrain.engines.deepspeed import DeepSpeedEngine  # an optional package, and seconds to import

        return DeepSpeedEngine(config, world)
    return FSDPEngine(config, world)


__all__ = ["Engine", "build_engine", "require_compiler"]
