"""One process trains in a run's folder at a time, whichever host it is on, and a dead one holds nobody up.

flock(2) does not do: on some network file systems it is local to a host, on others it is refused. Creating a file that
must not exist is atomic on all of them, so an owner is a numbered file, ``owner/00000003.json``. The highest number
owns the folder; to take over from a dead owner is to create the next number, in which only one can succeed, and an
owner that was only frozen finds that number when it wakes, and ends.

Whether the owner lives: on the same machine its process tells. From another, only its beat does, the modification time
of its file, renewed every period. Times of two clocks are never compared: who wants the folder looks for a change.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from models.errors import ConfigError
from pretrain.files import write_atomically
from pretrain.watchdog import period_of

log = logging.getLogger(__name__)

_NUMBERED = re.compile(r"\d{8}\.json")
_SPARE = 4  # periods beyond its silence after which every rank of a run whose first one is gone has ended (watchdog.py)


@dataclass(frozen=True)
class Owner:
    """Who trains, or did. ``machine``, ``namespace`` and ``started`` tell whether ``process`` can be looked up here."""

    host: str
    process: int
    machine: str
    namespace: str
    started: str
    silence: float  # seconds after which this owner, if not heard of, is taken for dead
    since: str  # for people
    job: str | None = None  # of SLURM
    released: bool = False

    @classmethod
    def here(cls, silence: float) -> Owner:
        return cls(
            socket.gethostname(),
            os.getpid(),
            _machine(),
            _namespace(),
            _started(os.getpid()) or "",
            silence,
            time.strftime("%Y-%m-%d %H:%M:%S"),
            os.environ.get("SLURM_JOB_ID"),
        )

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"host {self.host}, process {self.process}{job}, since {self.since}"

    @property
    def is_local(self) -> bool:
        return (self.machine, self.namespace) == (_machine(), _namespace())

    @property
    def lives_here(self) -> bool:
        """Of a local owner, whether its process is there."""
        return _started(self.process) == self.started


class FolderLock:
    """Holds ``folder`` against the processes of all hosts that see it. ``silence``: seconds, of parallel.silence."""

    def __init__(self, folder: Path, silence: float) -> None:
        self._folder, self._silence = folder / "owner", silence
        self._number = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="folder's lock", daemon=True)

    def acquire(self) -> None:
        """Become the owner, or a ConfigError that names who is. Waits only for an owner on another host to show
        whether it lives: its silence and a little more at most."""
        self._folder.mkdir(exist_ok=True)
        while True:
            number, owner = newest(self._folder)
            lives = False if owner is None or owner.released else self._lives(number, owner)
            if lives:
                raise ConfigError(
                    f"another process trains {self._folder.parent} ({owner}): wait until it ends, or write --name for "
                    "a new run"
                )
            if lives is False and self._take(number + 1):
                break
        self._thread.start()
        for old in range(number, 0, -1):
            if not self._path(old).exists():
                break
            self._path(old).unlink(missing_ok=True)

    @property
    def is_ours(self) -> bool:
        """False once another process took this one for dead."""
        return newest(self._folder)[0] == self._number

    def release(self) -> None:
        """Let the next one in at once. May be called more than once."""
        if self._released.is_set() or not self._number:
            return
        self._released.set()
        self._thread.join()
        with suppress(OSError):  # on a full disk: this process's death will tell
            if self.is_ours:
                owner = asdict(Owner.here(self._silence)) | {"released": True}
                write_atomically(self._path(self._number), json.dumps(owner).encode())

    def _take(self, number: int) -> bool:
        """A link, not an open with O_EXCL, so that the file has its content from its first moment on."""
        own = self._folder / f".{socket.gethostname()}.{os.getpid()}"
        try:
            own.write_text(json.dumps(asdict(Owner.here(self._silence))), encoding="utf-8")
            os.link(own, self._path(number))
        except FileExistsError:
            return False  # another took it since, and will show that it lives
        finally:
            own.unlink(missing_ok=True)
        if newest(self._folder)[0] != number:  # others came since, and took this number's file away with the old ones
            self._path(number).unlink(missing_ok=True)
            return False
        self._number = number
        return True

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.json"

    def _lives(self, number: int, owner: Owner) -> bool | None:
        """None if meanwhile another took over."""
        if owner.is_local:
            return owner.lives_here
        path, silence = self._path(number), max(owner.silence, self._silence)
        patience = silence + _SPARE * period_of(silence)
        log.warning(
            "%s is held by a process of another machine (%s): waiting up to %.0f s to see whether it lives",
            self._folder.parent,
            owner,
            patience,
        )
        first, end = _beat_of(path), time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(period_of(silence) / 2)
            if (beat := _beat_of(path)) != first:
                return None if beat is None else True
        return False

    def _beat(self) -> None:
        """Renew this owner's file until released; end the process if another owns the folder."""
        while not self._released.wait(period_of(self._silence)):
            try:
                if self.is_ours:
                    os.utime(self._path(self._number))
                    continue
            except OSError:  # a file server that is away for a while
                continue
            print(
                f"error: this process was not heard of in {self._folder.parent} for so long that another took it for "
                "dead and trains there now; this one ends",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)


def beating(folder: Path) -> bool:
    """Whether the owner of an ``owner`` folder lives, as far as a look tells: of one on another machine, whether its
    file was renewed lately by this machine's clock."""
    number, owner = newest(folder)
    if owner is None:
        return False
    if owner.is_local:
        return owner.lives_here
    beat = _beat_of(folder / f"{number:08d}.json")
    return beat is not None and time.time() - beat / 1e9 < owner.silence


def newest(folder: Path) -> tuple[int, Owner | None]:
    """The highest number in an ``owner`` folder and who that is; 0 and None if nobody ever was."""
    while numbers := [int(path.stem) for path in folder.glob("[0-9]*.json") if _NUMBERED.fullmatch(path.name)]:
        path = folder / f"{max(numbers):08d}.json"
        try:
            return max(numbers), Owner(**json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            continue  # another took over since
        except (ValueError, TypeError):
            raise ConfigError(f"{path} does not say who trains there: remove it if nobody does") from None
    return 0, None


def _beat_of(path: Path) -> int | None:
    try:
        with path.open("rb") as file:  # opening asks the server anew where attributes are cached (NFS)
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _machine() -> str:
    """Another one after each boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    """Containers of one machine number their processes each for itself."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _started(process: int) -> str | None:
    """When a process of this machine started, so that a number used again is not taken for it; None if it is gone."""
    if Path("/proc/self/stat").exists():
        try:
            state, *fields = Path(f"/proc/{process}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return None if state in "ZX" else fields[18]  # proc(5): 22nd of all
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
