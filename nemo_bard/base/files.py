"""Files that are whole or not there: atomic writes, hard links, a lock on a folder. Standard library only."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

LOCK = ".lock"
LOCK_WAIT_SECONDS = 20.0
"""Workers of the data loaders of a killed run notice its end within seconds; they hold the lock until then."""
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system without ``flock`` answers, such as Lustre mounted without it."""
NO_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
"""What a file system answers that cannot bring a file or folder onto the disk when asked; network ones often do not."""


def write_json(path: Path, value: object, *, durable: bool = True) -> None:
    """Write JSON whole or not at all; arguments as ``write_text``."""
    write_text(path, json.dumps(value, indent=2) + "\n", durable=durable)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a text as UTF-8; arguments as ``write_bytes``."""
    write_bytes(path, text.encode("utf-8"), durable=durable)


def write_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file beside ``path`` and rename it.

    Args:
        path: The file; its folder is made if needed.
        content: What it is to hold.
        durable: Wait until it is on the disk. Without, a crash of the machine may leave the old file, or an empty one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                _sync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    if durable:
        sync_folder(path.parent)


def _sync(handle: int) -> None:
    """Bring an open file or folder onto the disk, where the file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise


def sync_folder(path: Path) -> None:
    """Bring the names in a folder onto the disk, where the file system can."""
    handle = os.open(path, os.O_RDONLY)
    try:
        _sync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Bring a file onto the disk, where the file system can."""
    sync_folder(path)


def sync_tree(path: Path) -> None:
    """Bring every file of a folder, and their names, onto the disk."""
    for entry in [path, *path.rglob("*")]:
        if entry.is_symlink():
            continue
        handle = os.open(entry, os.O_RDONLY)
        try:
            _sync(handle)
        finally:
            os.close(handle)


def read_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object, or None if there is no such file.

    Raises:
        ValueError: If it is there and no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not readable as JSON ({error}); delete it or use another run_dir") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} does not hold a JSON object; delete it or use another run_dir")
    return value


@contextlib.contextmanager
def locked(run_dir: Path, *, key: str = "run_dir", wait_seconds: float | None = None) -> Iterator[None]:
    """Hold the run directory; the lock goes with the process, however it ends.

    On a file system without locks a line says that nothing keeps another run out.

    Args:
        run_dir: The folder; made if needed.
        key: What users know it as.
        wait_seconds: How long another run may go on holding it; ``LOCK_WAIT_SECONDS`` if None.

    Raises:
        ValueError: If another run holds it.
    """
    import fcntl

    run_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + (LOCK_WAIT_SECONDS if wait_seconds is None else wait_seconds)
    with (run_dir / LOCK).open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    file.seek(0)
                    raise ValueError(f"{key} {run_dir} is in use by another run ({file.read().strip()})") from error
                time.sleep(0.5)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                logger.warning(
                    "%s %s is on a file system without locks (%s): see to it yourself that no other run uses it",
                    key,
                    run_dir,
                    error.strerror,
                )
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        yield


def is_locked(run_dir: Path) -> bool | None:
    """Whether a run on this machine holds the directory now; None where the file system has no locks."""
    import fcntl

    try:
        with (run_dir / LOCK).open("r") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return False


def ran_here(run_dir: Path) -> bool:
    """Whether the last run was on this machine, so that its lock can be relied on."""
    file = run_dir / LOCK
    return not file.is_file() or file.read_text().rpartition(" on ")[2] == os.uname().nodename


def link_or_copy(path: Path, target: Path) -> bool:
    """Hard-link ``path`` (through symbolic links) to ``target``, else copy it in pieces; returns whether it was linked."""
    try:
        os.link(path.resolve(), target)
    except OSError as error:
        logger.info("cannot hard-link %s (%s); copying it", path, error.strerror)
        shutil.copyfile(path, target)
        return False
    return True


@contextlib.contextmanager
def write_whole(target: Path) -> Iterator[Path]:
    """Yield a new folder beside ``target``; rename it to ``target`` on success (replacing it), remove it on failure."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        folder.chmod(0o755)
        yield folder
        if target.exists():
            old = folder.with_name(folder.name + ".old")
            target.rename(old)
            folder.rename(target)
            shutil.rmtree(old)
        else:
            folder.rename(target)
    finally:
        if folder.exists():
            shutil.rmtree(folder)
