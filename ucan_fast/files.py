"""Writing files so that a crash or a full disk never leaves half of one behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import UcanError


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all.

    Args:
        path: where the file shall be. Its folder is made if it is missing.
        content: the bytes, or a function that writes them to the temporary path it is given.

    Raises:
        UcanError: the file could not be written (disk full, no permission). What stood at
            ``path`` before is untouched and no temporary file is left.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            if not callable(content):
                file.write(content)
        if callable(content):
            content(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _default_mode(temporary, 0o666)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if _is_io_error(error):
            raise UcanError(f"could not write {path}: {error}. Nothing was changed.") from error
        raise


@contextlib.contextmanager
def atomic_directory(path: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a temporary folder beside ``path``; when the block ends without an error it is
    renamed to ``path``. With ``overwrite`` an existing folder is replaced, and comes back if
    the last step fails.

    Raises:
        UcanError: ``path`` exists and ``overwrite`` is false (raised before the block runs, or
            after it if another process made the folder meanwhile), or the folder could not be
            written.
    """
    path = Path(path)
    check_output_folder(path, overwrite)
    temporary = retired = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        _default_mode(temporary, 0o777)
        # Once more: another run may have finished in the meantime.
        check_output_folder(path, overwrite)
        if path.exists():
            retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            os.replace(path, retired / "content")
        os.replace(temporary, path)
    except BaseException as error:
        if retired is not None and (retired / "content").exists() and not path.exists():
            os.replace(retired / "content", path)
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        if _is_io_error(error):
            raise UcanError(f"could not write {path}: {error}. Nothing was changed.") from error
        raise
    finally:
        if retired is not None:
            shutil.rmtree(retired, ignore_errors=True)


def check_output_folder(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Refuse an output folder that already exists, unless it may be replaced.

    Raises:
        UcanError: ``path`` is a file, or exists while ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UcanError(f"{path} exists and is not a folder; choose another output folder.")
    if path.exists() and not overwrite:
        raise UcanError(f"{path} exists already; choose another folder or ask to overwrite it.")


def _default_mode(path: Path, mode: int) -> None:
    # mkstemp and mkdtemp make private files; the result should be as an ordinary open() makes it.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, mode & ~umask)


def _is_io_error(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error type, with the system's text inside.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
