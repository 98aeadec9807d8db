"""Finds the parts of an archive that are read at once: a folder with its files, or a file of whole scans."""

import hashlib
import os
import re
import stat
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from covidjax.data.scan import dicom, itk
from covidjax.data.scan.sources import Entry, check_limits, open_entries, split_numbers
from covidjax.errors import UserError

_WHOLE = ('.zip', '.nii', '.nii.gz', *itk.ENDINGS)
_NEVER = ('.png', '.jpg', '.jpeg', '.tif', '.tiff', '.bmp', '.gif', '.txt', '.csv', '.json', '.xml', '.html', '.pdf')
_UID = re.compile(r'[0-9]+(\.[0-9]+)+')
_TRIES = 5  # files of a folder that are opened to find a DICOM header
_HEADER_BYTES = 65_536


class Unit(NamedTuple):
    """A part of an archive.

    Attributes:
      name: as in the tables: path relative to the archive, or as the text file spells it.
      path: folder or file.
      more: further folders that hold slices of the same series.
      signature: of the names, sizes and times of its files. If it is the same, so are the contents.
    """

    name: str
    path: Path
    more: tuple[Path, ...]
    signature: str


def list_units(archive: Path) -> list[Unit]:
    """Lists the units below a folder, or below the paths in a text file, one a line.

    Only names are looked at, and one header in each folder: folders beside each other whose slices name the same series
    are one unit.

    Raises:
      UserError: the archive or a path in the text file does not exist or is unreadable.
    """
    if archive.is_dir():
        roots = [(archive, '')]
    elif archive.is_file():
        try:
            lines = [line.strip() for line in archive.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f'--archive={archive}: neither a folder nor a text file of paths, one a line') from error
        roots = [(Path(line), line) for line in dict.fromkeys(lines) if line and not line.startswith('#')]
    else:
        raise UserError(f'--archive={archive}: no such folder or text file')
    units: dict[Path, Unit] = {}
    for root, spelt in roots:
        if not root.exists():
            raise UserError(f'{archive}: it names {spelt}, which does not exist')
        for unit in _list_root(root, spelt):
            units.setdefault(unit.path.absolute(), unit)
    found = sorted(units.values(), key=lambda unit: split_numbers(unit.name))
    return _join_folders(found)


def _list_root(root: Path, spelt: str) -> Iterator[Unit]:
    if root.is_file():
        yield Unit(spelt, root, (), _sign([root]))
        return
    unreadable: list[Path] = []
    for parent, folders, names in os.walk(root, onerror=lambda error: unreadable.append(Path(error.filename))):
        folders.sort()
        below = Path(parent).relative_to(root)
        loose = []
        for file in (Path(parent, name) for name in sorted(names)):
            lower = file.name.lower()
            if lower.endswith(_WHOLE):
                yield Unit(_join_name(spelt, below / file.name), file, (), _sign([file]))
            else:
                loose.append(file)
        if loose:
            yield Unit(_join_name(spelt, below), Path(parent), (), _sign(loose))
    # Reading these fails: they become failures, and the rest of the archive is predicted.
    for folder in unreadable:
        yield Unit(_join_name(spelt, folder.relative_to(root)), folder, (), '')


def _join_name(spelt: str, below: Path) -> str:
    return (Path(spelt) / below).as_posix()


def _sign(files: Sequence[Path]) -> str:
    """Returns a digest of the names, sizes and times of files."""
    lines = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            lines.append(f'{file.name} unreadable')
        else:
            lines.append(f'{file.name} {status.st_size} {status.st_mtime_ns}')
    return hashlib.sha256('\n'.join(lines).encode(errors='replace')).hexdigest()


def _join_folders(units: Sequence[Unit]) -> list[Unit]:
    """Joins folders of one parent whose first slices name the same, well-formed study and series."""
    folders = [unit for unit in units if unit.path.is_dir()]
    parents: dict[Path, list[Unit]] = {}
    for unit in folders:
        parents.setdefault(unit.path.parent, []).append(unit)
    beside = [unit for members in parents.values() if len(members) > 1 for unit in members]
    with ThreadPoolExecutor(8) as pool:
        labels = dict(zip([unit.name for unit in beside], pool.map(_find_label, beside), strict=True))
    joined: dict[tuple, list[Unit]] = {}
    for unit in units:
        label = labels.get(unit.name)
        joined.setdefault((unit.path.parent, *label) if label else (unit.name,), []).append(unit)
    result = []
    for members in joined.values():
        first, *others = members
        if others:
            signature = hashlib.sha256(''.join(unit.signature for unit in members).encode()).hexdigest()
            first = first._replace(more=tuple(unit.path for unit in others), signature=signature)
        result.append(first)
    return result


def _find_label(unit: Unit) -> tuple[str, str] | None:
    """Returns study and series UID of the first DICOM file in a folder, None if there is none or they are no UIDs."""
    try:
        files = _list_files(unit.path)[:_TRIES]
    except OSError:
        return None
    for file in files:
        try:
            with file.open('rb') as opened:
                label = dicom.read_label(opened.read(_HEADER_BYTES))
        except OSError:
            continue
        if label is not None:
            return label if all(_UID.fullmatch(part) for part in label) else None
    return None


def _list_files(folder: Path) -> list[Path]:
    files = [Path(entry.path) for entry in os.scandir(folder) if stat.S_ISREG(entry.stat().st_mode)]
    loose = [file for file in files if not file.name.lower().endswith(_WHOLE)]
    return sorted(filter(_may_be_dicom, loose), key=lambda file: split_numbers(file.name))


def _may_be_dicom(file: Path) -> bool:
    """Returns False for pictures and texts that are what their name says, which need not be read whole."""
    if not file.name.lower().endswith(_NEVER):
        return True
    with file.open('rb') as opened:
        return opened.read(132)[128:] == b'DICM'


@contextmanager
def open_unit(unit: Unit) -> Iterator[list[tuple[str, list[Entry]]]]:
    """Yields the entries of a unit in groups of (name of the unit, entries): one group, or one for each folder.

    Raises:
      UserError: as `open_entries`.
    """
    if not unit.path.is_dir():
        with open_entries(unit.path) as entries:
            yield [(unit.name, entries)]
        return
    groups = []
    try:
        for folder in (unit.path, *unit.more):
            name = (Path(unit.name).parent / folder.name).as_posix() if unit.more else unit.name
            files = _list_files(folder)
            check_limits(len(files), sum(file.stat().st_size for file in files), folder)
            groups.append((name, [Entry(f'{folder.name}/{file.name}', file.read_bytes, file) for file in files]))
        yield groups
    except OSError as error:
        raise UserError(f'cannot be read ({error.strerror or type(error).__name__}): fix its permissions') from error


def select_shard(units: Sequence[Unit], shard: tuple[int, int]) -> list[Unit]:
    """Returns the units of shard (number from 1, count). The name of a unit decides, so that shards never overlap."""
    number, count = shard
    return [unit for unit in units if zlib.crc32(unit.name.encode(errors='replace')) % count == number - 1]
