"""What every command here shares: how it ends, whatever ends it."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable
from types import FrameType

from models.errors import ConfigError


def require_device(name: str) -> None:
    """ConfigError if ``name`` is cuda and there is no GPU."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device is cuda, but no GPU is visible here; write cpu")


def run(main: Callable[[], None]) -> None:
    """``main()``, with the exit codes of the house.

    A mistake of the user's, or a disk that is full, is one line on standard error and 2. SIGINT is 130 and SIGTERM 143;
    either is raised where the program is, so that what stands half done is cleared away as after an error.
    """
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        main()
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # schedulers send it twice, and the second must not end the clearing away
    sys.exit(128 + number)
