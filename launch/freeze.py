"""Copy what a job will run into the run's folder: ``python -m launch freeze [--dry-run] CONFIG.yaml [...]``.

A job may wait for days and be requeued for weeks. What it runs must be what was submitted, whatever happens to the
checkout meanwhile, so the code and the resolved configuration go to ``runs/NAME/frozen/HASH/``: ``code/`` is put first
on Python's path, ``config.yaml`` has every key. The hash is of the content, so the same submission is one copy, whose
folder is printed. ``--code FOLDER`` copies the code alone, to ``FOLDER/frozen/HASH/``: for a study, each of whose cells
has a configuration of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from models.errors import ConfigError
from pretrain.cli import dump, load

ROOMS = ("models", "pretrain", "tools", "launch")
_KINDS = {".py", ".sh", ".sbatch", ".env"}


def main(arguments: list[str]) -> int:
    dry = arguments[:1] == ["--dry-run"]
    given = arguments[dry:]
    if given[:1] == ["--code"]:
        if len(given) != 2:
            raise ConfigError("freeze: write --code FOLDER, and nothing after it")
        print(freeze(Path(given[1]), None, dry))
    elif given and not given[0].startswith("--"):
        config = load(Path(given[0]), given[1:])
        print(freeze(Path(config.runs_dir) / config.name, dump(config), dry))
    else:
        raise ConfigError("freeze: no configuration file: write CONFIG.yaml [--section.key value ...]")
    return 0


def freeze(run: Path, config: str | None, dry: bool = False) -> Path:
    """The folder under ``run``, made now or before; whole, or not there. ``config``: YAML, None for the code alone;
    ``dry``: only where it would be."""
    from pretrain.run import FROZEN_REVISION, revision

    home = Path(__file__).parent.parent
    code = {
        str(path.relative_to(home)): path.read_bytes()
        for room in ROOMS
        for path in sorted((home / room).rglob("*"))
        if path.suffix in _KINDS and path.is_file()
    }
    everything = code if config is None else code | {"config.yaml": config.encode()}
    digest = hashlib.sha256()
    for name, content in everything.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    frozen = run / "frozen" / digest.hexdigest()[:12]
    if dry or frozen.exists():
        return frozen
    try:
        frozen.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=".", dir=frozen.parent))
        try:
            for name, content in everything.items():
                path = aside / name if name not in code else aside / "code" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            (aside / "code" / FROZEN_REVISION).write_text(json.dumps(revision(), indent=2) + "\n", encoding="utf-8")
            aside.chmod(0o755)
            os.rename(aside, frozen)
        except OSError:
            shutil.rmtree(aside, ignore_errors=True)
            if not frozen.exists():  # else another job was first
                raise
    except OSError as error:
        raise ConfigError(f"cannot freeze the code under {run}: {error.filename}: {error.strerror}") from None
    return frozen
