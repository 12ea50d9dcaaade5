"""Files that appear whole or not at all, and our safetensors files, whose content is checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import UcanError
from .interrupts import finished


def atomic_write(path: str | os.PathLike, content: bytes | Callable[[Path], None]) -> None:
    """Write a file whole or not at all.

    Args:
        path: where the file shall be. Its folder is made if it is missing.
        content: the bytes, or a function that writes them to the temporary path it is given.

    Raises:
        UcanError: the file could not be written (disk full, no permission). What stood at
            ``path`` before is untouched and no temporary file is left.
    """
    atomic_writes({Path(path): content})


def atomic_writes(contents: Mapping[Path, bytes | Callable[[Path], None]]) -> None:
    """Write several files together, each as :func:`atomic_write` does one.

    They are written beside their places first, and renamed when all are: what fails before the
    first rename leaves all as it was.

    Raises:
        UcanError: as :func:`atomic_write`. Where a rename failed it says which files are new.
    """
    temporary: dict[Path, Path] = {}
    renamed: list[str] = []
    path = None
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            temporary[path] = Path(name)
            with os.fdopen(handle, "wb") as file:
                if not callable(content):
                    file.write(content)
            if callable(content):
                content(temporary[path])
            with open(temporary[path], "rb") as file:
                os.fsync(file.fileno())
            _default_mode(temporary[path], 0o666)
        for path in contents:
            if path.is_dir() and not path.is_symlink():
                raise IsADirectoryError("it is a folder")
        with finished():
            for path, written in temporary.items():
                os.replace(written, path)
                renamed.append(path.name)
    except BaseException as error:
        for written in temporary.values():
            written.unlink(missing_ok=True)
        if _is_io_error(error):
            state = f"Beside it {', '.join(renamed)}: new" if renamed else "Nothing was changed"
            raise UcanError(f"could not write {path}: {error}. {state}.") from error
        raise


@contextlib.contextmanager
def atomic_directory(
    path: str | os.PathLike, overwrite: bool = False, *, only_with: Sequence[str] = ()
) -> Iterator[Path]:
    """A folder that appears whole or not at all.

    Yields a temporary folder beside ``path``; when the block ends without an error it is
    renamed to ``path``. With ``overwrite`` an existing folder is replaced, and comes back if
    the last step fails; ``only_with`` as in :func:`check_output_folder`.

    Raises:
        UcanError: ``path`` may not be written (:func:`check_output_folder`; raised before the
            block runs, or after it if another process made the folder meanwhile), or the folder
            could not be written.
    """
    path = Path(path)
    check_output_folder(path, overwrite, only_with=only_with)
    temporary = retired = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        yield temporary
        _default_mode(temporary, 0o777)
        # Once more: another run may have finished in the meantime.
        check_output_folder(path, overwrite, only_with=only_with)
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


def write_safetensors(
    path: str | os.PathLike,
    kind: str,
    version: str,
    metadata: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    """Write one of our own files, whole or not at all, for :func:`read_safetensors`.

    Args:
        path: where the file shall be.
        kind, version: what it is, in which format version.
        metadata: anything else about it; the names format, version and sha256 are taken.
        tensors: on the CPU.

    Raises:
        UcanError: the file could not be written; what stood there before is untouched.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {**metadata, "format": kind, "version": version}
    metadata["sha256"] = _digest(metadata, tensors)
    atomic_write(path, lambda temporary: save_file(tensors, temporary, metadata))


def safetensors_kind(path: str | os.PathLike) -> str | None:
    """Which of our own files this says it is (its content is not checked), None for others.

    Raises:
        UcanError: the file is missing or no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format")
    except (SafetensorError, OSError, ValueError) as error:
        raise UcanError(f"{path} cannot be read: {error}.") from error


def read_safetensors(
    path: str | os.PathLike, kind: str, version: str
) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """Metadata and tensors of one of our own files.

    Raises:
        UcanError: the file is missing, truncated, corrupt (one bit is enough), of another kind or
            another version.
    """
    if Path(path).is_dir():
        raise UcanError(f"{path} is a folder; name the file in it.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # Copies: get_tensor returns the mapped file, which others may still write to.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UcanError(f"{path} does not exist.") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise UcanError(f"{path} is truncated or corrupt: {error}.") from error
    if metadata.get("format") != kind:
        raise UcanError(f"{path} is no {kind} file (it says {metadata.get('format')!r}).")
    if metadata.get("version") != version:
        raise UcanError(
            f"{path} has format version {metadata.get('version')}, this ucan_fast reads {version}: "
            "make it again."
        )
    if metadata.pop("sha256", None) != _digest(metadata, tensors):
        raise UcanError(
            f"{path} is truncated or corrupt: its content does not match its checksum. Make it "
            "again, or copy it again from where it is whole."
        )
    return metadata, tensors


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_output_folder(
    path: str | os.PathLike, overwrite: bool = False, *, only_with: Sequence[str] = ()
) -> None:
    """Refuse an output folder that already exists, unless it may be replaced.

    Args:
        only_with: names by which a folder is known as an earlier output: one that lacks any of
            them is replaced only if it is empty.

    Raises:
        UcanError: ``path`` is a file or a symbolic link, exists while ``overwrite`` is false, or
            is a folder that ``only_with`` protects.
    """
    path = Path(path)
    # A rename would replace the link and leave the folder it points to.
    if path.is_symlink():
        raise UcanError(f"{path} is a symbolic link; give the folder itself.")
    if not path.exists():
        return
    if not path.is_dir():
        raise UcanError(f"{path} exists and is not a folder; choose another output folder.")
    if not overwrite:
        raise UcanError(f"{path} exists already; choose another folder or ask to overwrite it.")
    lacking = [name for name in only_with if not (path / name).is_file()]
    if lacking and any(path.iterdir()):
        raise UcanError(
            f"{path} is no earlier output (it has no {lacking[0]}) and not empty, so it is not "
            "replaced; choose another folder."
        )


def _default_mode(path: Path, mode: int) -> None:
    # mkstemp and mkdtemp make private files; the result should be as an ordinary open() makes it.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, mode & ~umask)


def _is_io_error(error: BaseException) -> bool:
    # safetensors reports a full disk as its own error type, with the system's text inside.
    return isinstance(error, OSError) or type(error).__name__ == "SafetensorError"
