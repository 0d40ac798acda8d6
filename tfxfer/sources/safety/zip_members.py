"""Zip archives (.keras, newer .pth): members contained, plain and bounded before any of them is read."""

import contextlib
import io
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from tfxfer.sources.safety.refusal import MAX_CONFIG_BYTES, expands_too_much, refusal, shown

MAX_MEMBERS = 20_000
# The list of members is parsed whole by `zipfile`.
MAX_LIST_BYTES = 8 * 2**20
_END = b"PK\x05\x06"
_END_64 = b"PK\x06\x06"
_DOWNLOAD = "get the file again from where it was published"


def contained(name: str) -> bool:
    r"""Whether a member's name stays inside the folder it is unpacked to, on every platform.

    Example:
        >>> [contained(name) for name in ("assets/a.txt", "../a", "/a", "C:/a", "a\\b", "a/./b", "")]
        [True, False, False, False, False, False, False]
    """
    if not name or any(ord(letter) < 32 for letter in name) or "\\" in name or ":" in name or name.startswith("/"):
        return False
    return all(part not in ("", ".", "..") for part in name.removesuffix("/").split("/"))


@contextlib.contextmanager
def opened_zip(path: Path) -> Iterator[tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]]:
    """Open `path` and check the list of its members; nothing is unpacked.

    Yields:
        The archive, and its members by name.

    Raises:
        InputError: Where it is no zip, or a member would leave its folder, is a link, is encrypted, comes twice,
            overlaps another, or would grow far beyond what is stored.
    """
    _check_list_size(path)
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, UnicodeError, struct.error) as error:
        raise refusal(path, f"it cannot be read as a zip archive ({error})", _DOWNLOAD) from error
    with archive:
        yield archive, _checked_members(path, archive)


def read_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """The bytes of a small member (a config); at most 16 MiB.

    Raises:
        InputError: Where it is larger, or damaged.
    """
    if info.file_size > MAX_CONFIG_BYTES:
        raise refusal(
            path,
            f"its member {shown(info.filename)} has {info.file_size:,} bytes, and a config may have "
            f"{MAX_CONFIG_BYTES:,}",
            "no model needs so much: do not use this file",
        )
    try:
        return archive.read(info)  # zipfile stops at the declared size and compares the checksum
    except Exception as error:  # a damaged member raises zlib, zip and struct errors
        raise refusal(path, f"its member {shown(info.filename)} is damaged ({error})", _DOWNLOAD) from error


@contextlib.contextmanager
def opened_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[IO[bytes]]:
    """A seekable stream of a large member, without holding it in memory."""
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(info.header_offset + 26)
            name_bytes, extra_bytes = struct.unpack("<HH", file.read(4))
            start = info.header_offset + 30 + name_bytes + extra_bytes
            yield io.BufferedReader(_Slice(file, start, info.file_size))
        return
    with tempfile.TemporaryFile() as copy:
        try:
            with archive.open(info) as member:
                while block := member.read(2**20):
                    copy.write(block)
        except Exception as error:
            raise refusal(path, f"its member {shown(info.filename)} is damaged ({error})", _DOWNLOAD) from error
        copy.seek(0)
        yield copy


class _Slice(io.RawIOBase):
    """Part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        found = self._file.read(wanted)
        buffer[: len(found)] = found
        self._position += len(found)
        return len(found)


def _check_list_size(path: Path) -> None:
    """Refuse a huge list of members before `zipfile` makes an object of each."""
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size_bytes - 2**16 - 128))
        tail = file.read()
    end = tail.rfind(_END)
    if end < 0 or len(tail) < end + 22:
        raise refusal(path, "it is not a zip archive, or its end is missing", _DOWNLOAD)
    count, list_bytes = struct.unpack_from("<HL", tail, end + 10)
    end_64 = tail.rfind(_END_64, 0, end)
    if end_64 >= 0 and end - end_64 >= 56:
        more_count, more_bytes = struct.unpack_from("<QQ", tail, end_64 + 32)
        count, list_bytes = max(count % 0xFFFF, more_count), max(list_bytes % 0xFFFFFFFF, more_bytes)
    if count > MAX_MEMBERS or list_bytes > MAX_LIST_BYTES:
        raise refusal(
            path,
            f"it lists {count:,} members in {list_bytes:,} bytes, more than {MAX_MEMBERS:,} in {MAX_LIST_BYTES:,}",
            "no model needs so many: do not use this file",
        )


def _checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name, each of them checked by what the list says."""
    members: dict[str, zipfile.ZipInfo] = {}
    folded: set[str] = set()
    for info in archive.infolist():
        if problem := _problem(info):
            raise refusal(path, f"its member {shown(info.filename)} {problem}", "do not use this file")
        # "A" and "a" are one file where case does not count.
        key = str(PurePosixPath(info.filename)).casefold()
        if key in folded:
            raise refusal(path, f"its member {shown(info.filename)} comes twice", "do not use this file")
        folded.add(key)
        members[info.filename] = info
    _check_overlap(path, archive)
    return members


def _problem(info: zipfile.ZipInfo) -> str:
    """What is wrong with a member, or ''."""
    kind = stat.S_IFMT(info.external_attr >> 16)
    if not contained(info.filename) or info.filename != info.orig_filename:
        return "would be unpacked outside its folder"
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device instead of a file"
    if info.flag_bits & 0x1:
        return "is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"is compressed by method {info.compress_type} instead of deflate"
    if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
        return "is stored with two different sizes"
    if expands_too_much(info.file_size, info.compress_size):
        return f"grows from {info.compress_size:,} to {info.file_size:,} bytes: a zip bomb"
    return ""


def _check_overlap(path: Path, archive: zipfile.ZipFile) -> None:
    """Members that share bytes are how a small file becomes a large one in spite of the ratio."""
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        if info.header_offset < end:
            raise refusal(path, f"its member {shown(info.filename)} overlaps another", "do not use this file")
        end = info.header_offset + 30 + info.compress_size
    if end > path.stat().st_size:
        raise refusal(path, "a member reaches beyond the end of the file", _DOWNLOAD)
