"""How a run survives full disks, signals and other processes, and says so in one sentence.

    with alone_in(folder), watch.listening():       # no other process; Ctrl-C and SIGTERM are heard
        watch.busy = True                           # from here on a signal waits ...
        write(path, content)                        # a whole file, or the old one
        watch.rest()                                # ... until here
"""

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from distributed import contact_lost, rank, world_size

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def stop(message: str, status: int = 2) -> NoReturn:
    """Say in one sentence what the user can mend, and exit with that status."""
    who = f"[process {rank()}] " if rank() else ""
    tqdm.write(who + message, file=sys.stderr)  # print would be glued to an open progress bar
    raise SystemExit(status)


# --------------------------------------------------------------------------------------------------
# Files


def write(path: Path, content: str | bytes) -> None:
    """Write a file beside and rename it: a reader sees the old file or the new one. If that fails,
    one sentence and exit status 1; the old file stays, and nothing beside it."""
    content = content.encode() if isinstance(content, str) else content
    beside = path.with_name(path.name + ".tmp")
    try:
        with locked(path.parent):  # another process may be about to write the same file
            try:
                beside.write_bytes(content)
                with open(beside, "r+b") as f:
                    os.fsync(f.fileno())  # a rename may reach the disk before the content does
                os.replace(beside, path)
            finally:
                with suppress(OSError):
                    beside.unlink(missing_ok=True)
    except OSError as e:
        stop(f"{path} could not be written ({e.strerror}): it needs {megabytes(len(content))}; "
             f"mend that, and go on with `{this_command()}`", 1)


def check_space(folder: Path, needed: int) -> None:
    """One sentence and exit status 1 if the disk of a folder has less room than `needed` bytes."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        stop(f"{folder} needs about {megabytes(needed)} for this run, and {megabytes(free)} of its "
             "disk are free: make room first", 1)


def megabytes(size: int) -> str:
    """A number of bytes in words, rounded up."""
    return f"{max(1, -(-size // 10**6))} MB"


def this_command() -> str:
    """The command that goes on where this process stops."""
    script = Path(sys.argv[0])
    words = [script.name if script.is_absolute() else str(script), *sys.argv[1:]]
    words += ["--resume"] * (script.name == "train.py" and "--resume" not in words)
    return f"{launcher(world_size())} {shlex.join(words)}"


def launcher(processes: int) -> str:
    """The beginning of a command that runs a script in so many processes, on these nodes."""
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", 1))  # torchrun says so
    if processes == 1:
        return "python"
    if nodes == 1 or processes % nodes:
        return f"torchrun --nproc_per_node={processes}"
    return (f"torchrun --nnodes={nodes} --nproc_per_node={processes // nodes} "
            "[other options as before]")


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool | None]:
    """Lock a file or a folder until the `with` block ends -> whether the lock is ours; without
    `wait`, another process may have it. None where there are no locks (Windows, some network file
    systems). The system frees a lock when its process ends, in whatever way."""
    if not fcntl:
        yield None
        return
    opened, ours = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR), True
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            ours = False
        except OSError:
            ours = None
        yield ours
    finally:
        os.close(opened)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder if need be, and keep other processes out of it until the `with` block ends. Of
    several processes that work together, the first holds it for all."""
    if rank():
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folder / "lock"
        if lock.is_symlink() or lock.exists() and not lock.is_file():
            raise OSError(0, "its lock is no regular file")
        lock.touch()
    except OSError as e:
        stop(f"{folder} cannot be written to ({e.strerror}): mend that, or work in another folder")
    with locked(lock, wait=False) as ours:
        if ours is False:
            stop(f"{folder} is in use by another process: wait for that, or choose another --name")
        yield


# --------------------------------------------------------------------------------------------------
# Signals


class Watch:
    """Ctrl-C (SIGINT) and what schedulers send (SIGTERM) end the process at once, in one sentence;
    but while it is `busy`, they wait for `rest`, unless Ctrl-C comes twice."""

    def __init__(self):
        self.busy, self.signal = False, 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals until the `with` block ends, and let no full disk, and whatever else keeps
        files from being read or written, end in a traceback."""
        before = {s: signal.signal(s, self._hear) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except OSError as e:
            stop(f"{e.filename or 'a file'} could not be read or written ({e.strerror or e}): mend "
                 f"that, and go on with `{this_command()}`", 1)
        except RuntimeError as e:
            if not contact_lost(e):
                raise
            stop("another process of this run has ended: its own words say why", 1)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _hear(self, number: int, frame) -> None:
        again = number == self.signal == signal.SIGINT  # SIGTERM may come twice: torchrun passes
        self.signal = number  # it on, and the scheduler may have told all processes already
        if again or not self.busy:
            self.rest()
        elif not rank():
            more = "; Ctrl-C again stops at once" * (number == signal.SIGINT)
            with suppress(OSError):  # print may be what the signal has interrupted
                os.write(2, f"\nfinishing this step and writing a checkpoint{more}\n".encode())

    def rest(self) -> None:
        """The process is no longer busy; if a signal has come, it ends here."""
        self.busy = False
        if self.signal:
            stop(f"interrupted ({signal.Signals(self.signal).name}): go on with "
                 f"`{this_command()}`", 128 + self.signal)
