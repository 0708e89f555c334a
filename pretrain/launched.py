"""What a launcher and a run tell each other, in a folder of that launch: ``stop``, asked of the run; ``outcome.json``,
how it ended; ``errors.txt``, why it crashed. torchrun and srun change exit codes, and forward signals late or twice;
files they leave alone. Without a launcher there is no folder, and the process's own exit code is the answer."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

VARIABLE = "EQUIPOISE_LAUNCH"  # the folder, set by the launcher
STOP = "stop"
OUTCOME = "outcome.json"
ERRORS = "errors.txt"


def folder() -> Path | None:
    """The launch's, on a file system that all nodes share; None where no launcher is."""
    here = os.environ.get(VARIABLE)
    return Path(here) if here else None


def report(code: int, text: str, **more: object) -> None:
    """Leave word how the run ended: the exit code, the line that was printed, and what else there is to say. The first
    word counts. A disk that does not take it is no second failure: the launch then counts as failed."""
    if (here := folder()) is None:
        return
    content = json.dumps({"code": code, "text": text, **more}) + "\n"
    partial = here / f".{OUTCOME}.{os.getpid()}"
    with suppress(OSError):
        try:
            partial.write_text(content, encoding="utf-8")
            os.link(partial, here / OUTCOME)  # never over another's word
        finally:
            partial.unlink(missing_ok=True)


def crashed(line: str) -> None:
    """Leave word why, in one place for all ranks: most print into files of their own. ``line`` is one line."""
    if (here := folder()) is not None:
        with suppress(OSError), (here / ERRORS).open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def exit_code(code: int) -> int:
    """Of an end that all ranks agreed on and that was reported: 0 under a launcher, because torchrun takes any other
    for a crash and ends the other ranks."""
    return code if folder() is None else 0
