"""What every command here shares: a user's mistake is one line on standard error and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from models.errors import ConfigError


def run(main: Callable[[], None]) -> None:
    """``main()``, with the exit codes of the house."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    try:
        main()
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
