"""A SavedModel in a .tar.gz, as TF Hub hands it out: read twice, first to check, then to write."""

import contextlib
import gzip
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from tfxfer.errors import InputError
from tfxfer.sources.safety.refusal import SMALL_BYTES, expands_too_much, refusal, shown
from tfxfer.sources.safety.zip_members import contained

MAX_MEMBERS = 10_000
MAX_BYTES = 16 * 2**30
# Long names and the like come in blocks of their own, which tarfile reads whole.
MAX_EXTRA_BYTES = 2**16
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE)
_EXTRA = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_HOSTILE = "do not use this archive"
_DAMAGED = "get the file again from where it was published"


def extract_archive(path: str | Path, into: str | Path) -> Path:
    """Unpack a .tar.gz (or .tar) of a model, after all of its members have been checked.

    Args:
        path: The archive.
        into: The folder to make; it must not exist, or be empty. Nothing is left of it where the archive is refused.

    Returns:
        The folder that holds saved_model.pb: `into` itself, or the only folder in it.

    Raises:
        InputError: Where a member would leave the folder, is a link or a device, or comes twice; where there are
            too many or they grow too large; where the archive is damaged; where `into` is in use.
    """
    path, into = Path(path), Path(into)
    if into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise InputError(f"{str(into)!r} is not an empty folder; name another to unpack {str(path)!r} to.")
    with _members(path) as members:
        for _ in members:
            pass
    into.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{into.name}-", dir=into.parent))
    try:
        with _members(path) as members:
            for name, stream in members:
                _write(temporary / name, stream)
        temporary.chmod(0o755)
        if into.exists():
            into.rmdir()
        temporary.rename(into)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    found = [item for item in into.iterdir() if item.is_dir()]
    inside = len(found) == 1 and not (into / "saved_model.pb").exists() and (found[0] / "saved_model.pb").exists()
    return found[0] if inside else into


class _CheckedInfo(tarfile.TarInfo):
    """A member's header, refused before tarfile reads what follows it."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> "_CheckedInfo":
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTRA and info.size > MAX_EXTRA_BYTES:
            raise ValueError(f"a name of {info.size:,} bytes")
        if info.type not in (*_PLAIN, *_EXTRA):
            raise ValueError(f"{shown(info.name)} is a link, a device or a sparse file")
        return info


@contextlib.contextmanager
def _members(path: Path) -> Iterator[Iterator[tuple[str, Any]]]:
    """Name and stream of each member, in order; the stream is None for a folder."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        try:
            with (
                gzip.GzipFile(fileobj=file) if packed else contextlib.nullcontext(file) as plain,
                tarfile.open(fileobj=plain, mode="r|", tarinfo=_CheckedInfo) as tar,  # type: ignore[call-overload]
            ):
                yield _checked(path, tar)
                _drain(path, plain)
        except InputError:
            raise
        except (tarfile.TarError, ValueError, EOFError, OSError, zlib.error, UnicodeError) as error:
            raise refusal(path, f"it cannot be unpacked ({str(error)[:160]})", _DAMAGED) from error


def _checked(path: Path, tar: tarfile.TarFile) -> Iterator[tuple[str, Any]]:
    """Each member, checked before it is read."""
    stored_bytes, total_bytes = path.stat().st_size, 0
    seen: set[str] = set()
    for info in tar:
        name = info.name.removeprefix("./").rstrip("/")
        if name in ("", ".") and info.isdir():
            continue
        if info.type not in _PLAIN or info.issparse():
            raise refusal(path, f"its member {shown(info.name)} is a link, a device or a sparse file", _HOSTILE)
        if not contained(name):
            raise refusal(path, f"its member {shown(info.name)} would be unpacked outside its folder", _HOSTILE)
        if name.casefold() in seen and not info.isdir():
            raise refusal(path, f"its member {shown(info.name)} comes twice", _HOSTILE)
        seen.add(name.casefold())
        total_bytes += info.size
        if total_bytes > MAX_BYTES or expands_too_much(total_bytes, stored_bytes):
            raise refusal(
                path, f"its members up to {shown(name)} grow from {stored_bytes:,} to {total_bytes:,} bytes", _HOSTILE
            )
        if len(seen) > MAX_MEMBERS:
            raise refusal(path, f"it has more than {MAX_MEMBERS:,} members", _HOSTILE)
        yield str(PurePosixPath(name)), None if info.isdir() else tar.extractfile(info)


def _drain(path: Path, plain: Any) -> None:
    """Read on to the end, where gzip keeps its checksum: tarfile stops before it."""
    left_bytes = SMALL_BYTES
    while block := plain.read(2**20):
        left_bytes -= len(block)
        if left_bytes < 0:
            raise refusal(path, f"more than {SMALL_BYTES:,} bytes follow its last member", _HOSTILE)


def _write(target: Path, stream: Any) -> None:
    if stream is None:
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:
        shutil.copyfileobj(stream, file, 2**20)
