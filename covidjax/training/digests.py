"""Digests of a folder's files: what tells damage that the reader of the files does not notice."""

import hashlib
import json
from pathlib import Path

from covidjax.files import write_json

FILE_NAME = 'sha256.json'


def write_digests(folder: Path) -> None:
    """Writes sha256.json into a folder: the digest of every file below it. It marks the folder as whole."""
    write_json(folder / FILE_NAME, {name: _compute_digest(folder / name) for name in _list_files(folder)})


def is_finished(folder: Path) -> bool:
    """Says whether `write_digests` came to its end."""
    return (folder / FILE_NAME).exists()


def find_damage(folder: Path) -> list[str]:
    """Returns what is wrong with the files of a folder; empty if every file is as it was when the digests were taken.

    A folder without digests counts as unfinished, whatever else it holds.
    """
    try:
        digests = json.loads((folder / FILE_NAME).read_text())
    except FileNotFoundError:
        return [f'{FILE_NAME} is missing: it was not finished']
    except (OSError, ValueError):
        return [f'{FILE_NAME} is unreadable']
    present = set(_list_files(folder))
    faults = [f'{name} is missing' for name in sorted(digests.keys() - present)]
    return faults + [
        f'{name} has changed'
        for name in sorted(digests.keys() & present)
        if _compute_digest(folder / name) != digests[name]
    ]


def _list_files(folder: Path) -> list[str]:
    return [
        path.relative_to(folder).as_posix()
        for path in sorted(folder.rglob('*'))
        if path.is_file() and path.name != FILE_NAME
    ]


def _compute_digest(path: Path) -> str:
    with path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()
