"""Command lines whose mistakes are one line, like every other."""

from __future__ import annotations

import argparse
from typing import NoReturn

from models.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse's, which raises a ConfigError in place of printing its usage and leaving."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")
