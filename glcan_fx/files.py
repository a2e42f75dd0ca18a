"""Files that are there whole or not at all: written beside their place, and renamed."""

import errno
import io
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any


def write(path: str | Path, content: str | bytes) -> None:
    """Write a file as a whole; text as UTF-8. What was there stays where that fails."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_figure(path: str | Path, figure: Any, dpi: int = 120) -> None:
    """Write a matplotlib figure, in the format of the file's ending."""
    with replacing(path) as file:
        figure.savefig(file, dpi=dpi, format=Path(path).suffix.removeprefix("."))


@contextmanager
def replacing(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of ``path`` when all is written.

    An exception (a full disk, an interruption) leaves what was there. Links, permissions and devices are as for
    ``open(path, "wb")``. Raises OSError that names ``path`` and says what to do.
    """
    path = Path(path)
    if _is_device(path):
        with path.open("wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{secrets.token_hex(8)}.part")
    failed: list[OSError] = []
    with _explaining(path):
        _refuse_protected(target)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        buffered = io.BufferedWriter(_Noting(descriptor, failed))
        try:
            yield buffered
            with _explaining(path):
                buffered.flush()
                os.fsync(descriptor)  # what it holds, before its name
        finally:
            with suppress(OSError):  # of what could not be written
                buffered.close()
        with _explaining(path):
            _like(temporary, target)
            os.replace(temporary, target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if failed and isinstance(error, Exception) and error.__cause__ is not failed[0]:
            raise _explained(failed[0], path) from error  # whoever writes may have said so in other words
        raise


@contextmanager
def _explaining(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise _explained(error, path) from error


def _explained(error: OSError, path: Path) -> OSError:
    """The same error, which names the file that was to be written, and says what to do."""
    if isinstance(error, FileNotFoundError):
        hint = "make the folder first"
    elif error.errno in (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None)):
        hint = "make room, or write to another place; what was there is as it was"
    elif isinstance(error, PermissionError) or error.errno == errno.EROFS:
        hint = "write to another place, or change the permissions of the file and its folder"
    else:
        hint = "write to another place; what was there is as it was"
    return OSError(error.errno, f"{error.strerror or error}: {hint}", str(path))


class _Noting(io.FileIO):
    """Notes why it could not be written."""

    def __init__(self, descriptor: int, failed: list[OSError]) -> None:
        super().__init__(descriptor, "wb")
        self.failed = failed

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.failed.append(error)
            raise


def _is_device(path: Path) -> bool:
    """Whether a path is not a file that could be replaced: /dev/stdout, a pipe."""
    try:
        return not stat.S_ISREG(path.stat().st_mode) or path.parent in (Path("/dev"), Path("/dev/fd"))
    except OSError:
        return False


def _refuse_protected(target: Path) -> None:
    """Renaming would replace even a file that may not be written."""
    if target.exists() and not os.access(target, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))


def _like(made: Path, target: Path) -> None:
    """The permissions of the file that is replaced, where there is one."""
    with suppress(FileNotFoundError):
        old = target.stat()
        os.chmod(made, stat.S_IMODE(old.st_mode))
        if hasattr(os, "chown"):
            with suppress(PermissionError):
                os.chown(made, old.st_uid, old.st_gid)
