"""Lists the files of an input: a file, a folder or a zip archive. Nothing is unpacked to disk."""

import contextlib
import hashlib
import io
import lzma
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from covidjax.errors import TooLargeError, UserError

MAX_FILES = 20_000
MAX_BYTES = 4_000_000_000  # total size of all files; a CT of 2,000 slices has 1 GB
MAX_INNER = 100  # zip archives in a folder or an archive
MAX_RATIO = 200  # compression ratio of a zip; CT compresses by 2 to 10
_OF_DECODERS = (zlib.error, lzma.LZMAError, NotImplementedError, RuntimeError, EOFError, ValueError)
_SMALL = 100_000_000  # bytes; below this size any ratio is harmless


class Entry(NamedTuple):
    """One file of an input.

    Attributes:
      name: inside the input.
      read: returns its bytes.
      path: of the file; None inside a zip archive.
    """

    name: str
    read: Callable[[], bytes]
    path: Path | None = None


@contextlib.contextmanager
def open_entries(path: Path) -> Iterator[list[Entry]]:
    """Yields the regular files of an input in natural order: a single file, or all below a folder or in a zip archive.

    Zip archives in a folder or in another archive are opened too, one level deep. For the file DICOMDIR of a medium the
    folder beside it is read.

    Raises:
      UserError: the input does not exist, is unreadable, or has too many or too large files; a zip is damaged or
        encrypted, has paths outside itself or is a zip bomb.
    """
    if path.name.upper() == 'DICOMDIR' and path.is_file():
        path = path.resolve().parent
    try:
        if path.is_dir():
            with contextlib.ExitStack() as stack:
                yield _open_inner(_list_folder(path), path, stack)
        elif not path.is_file():
            raise UserError(f'{path}: no such file or folder')
        elif zipfile.is_zipfile(path):
            with contextlib.ExitStack() as stack:
                archive = stack.enter_context(zipfile.ZipFile(path))
                yield _open_inner(_list_archive(archive, path, path.stat().st_size), path, stack)
        elif path.suffix.lower() == '.zip':
            raise UserError(f'{path}: a damaged or truncated zip archive; copy it again')
        else:
            check_limits(1, path.stat().st_size, path)
            yield [Entry(path.name, path.read_bytes, path)]
    except OSError as error:
        raise UserError(
            f'{path}: cannot be read ({error.strerror or type(error).__name__}): fix its permissions, or copy it again'
        ) from error
    except (zipfile.BadZipFile, *_OF_DECODERS) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f'{path}: a damaged zip archive; copy it again, or unpack it and name the folder') from error


def _list_folder(folder: Path) -> list[Entry]:
    entries, size = [], 0
    for parent, _, names in os.walk(folder):
        for name in names:
            file = Path(parent, name)
            status = file.stat() if file.exists() else file.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            size += status.st_size
            entries.append(Entry(file.relative_to(folder).as_posix(), file.read_bytes, file))
            check_limits(len(entries), size, folder)
    return sorted(entries, key=lambda entry: split_numbers(entry.name))


def _list_archive(archive: zipfile.ZipFile, path: Path, packed: int) -> list[Entry]:
    """Returns the members of an archive of `packed` bytes; `path` is for messages."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    size = sum(member.file_size for member in members)
    check_limits(len(members), size, path)
    if size > _SMALL and size > MAX_RATIO * packed:
        raise TooLargeError(f'{path}: unpacks to more than {MAX_RATIO} times its size, taken for a zip bomb')
    for member in members:
        if member.flag_bits & 1:
            raise UserError(f'{path}: an encrypted zip archive; unpack it and name the folder')
        inside = PurePosixPath(member.filename.replace('\\', '/'))
        if inside.is_absolute() or '..' in inside.parts or re.match(r'[A-Za-z]:', member.filename):
            raise UserError(f'{path}: a zip archive with paths outside itself; unpack it with care and name the folder')
    entries = [Entry(m.filename, lambda member=m: archive.read(member)) for m in members]
    return sorted(entries, key=lambda entry: split_numbers(entry.name))


def _open_inner(entries: Sequence[Entry], path: Path, stack: contextlib.ExitStack) -> list[Entry]:
    """Returns the entries with zip archives among them replaced by their members."""
    found: list[Entry] = []
    num_archives = size = 0
    for entry in entries:
        if not entry.name.lower().endswith('.zip'):
            found.append(entry)
            continue
        num_archives += 1
        if num_archives > MAX_INNER:
            raise UserError(f'{path}: more than {MAX_INNER} zip archives; name one of them')
        inner = path / entry.name
        try:
            # A file stays on disk; a member is in memory while the input is open.
            data = entry.path or io.BytesIO(entry.read())
            packed = entry.path.stat().st_size if entry.path else len(data.getbuffer())
            archive = stack.enter_context(zipfile.ZipFile(data))
            members = _list_archive(archive, inner, packed)
        except (zipfile.BadZipFile, *_OF_DECODERS) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'{inner}: a damaged zip archive; copy it again, or take it away') from error
        size += sum(member.file_size for member in archive.infolist())
        found += [member._replace(name=f'{entry.name}/{member.name}') for member in members]
        check_limits(len(found), size, path)
    return sorted(found, key=lambda entry: split_numbers(entry.name))


def check_limits(count: int, size: int, path: Path) -> None:
    """Raises UserError if an input has too many files or bytes."""
    if count > MAX_FILES or size > MAX_BYTES:
        raise TooLargeError(
            f'{path}: more than {MAX_FILES:,} files or {MAX_BYTES / 1e9:.0f} GB; name the folder of one scan'
        )


def split_numbers(name: str) -> list[tuple[int, str]]:
    """Returns a key for natural sorting of names: 'a2' before 'a10'."""
    parts = re.split(r'(\d+)', name.lower())
    return [(int(part), '') if i % 2 else (-1, part) for i, part in enumerate(parts)]


def hash_contents(digests: list[bytes]) -> str:
    """Returns the SHA-256, in hex, of an input from those of its files. A folder and its zip give the same."""
    if len(digests) == 1:
        return digests[0].hex()
    return hashlib.sha256(b''.join(sorted(digests))).hexdigest()
