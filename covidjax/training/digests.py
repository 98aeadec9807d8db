"""SHA-256 digests of a folder's files, to detect damage that the file's reader does not report."""

import hashlib
import json
from pathlib import Path

from covidjax.files import write_json

FILE_NAME = 'sha256.json'


def write_digests(folder: Path) -> None:
    """Writes sha256.json with the digest of every file below a folder. Its presence marks the folder as complete."""
    write_json(folder / FILE_NAME, {name: _compute_digest(folder / name) for name in _list_files(folder)})


def is_finished(folder: Path) -> bool:
    """Returns whether `write_digests` has completed for this folder."""
    return (folder / FILE_NAME).exists()


def find_damage(folder: Path) -> list[str]:
    """Returns missing and changed files of a folder, one message each; empty if every file matches its digest.

    A folder without digests counts as unfinished.
    """
    try:
        digests = json.loads((folder / FILE_NAME).read_text())
    except FileNotFoundError:
        return [f'{FILE_NAME} is missing: the folder is incomplete']
    except (OSError, ValueError):
        return [f'{FILE_NAME} is unreadable']
    present = set(_list_files(folder))
    # Either of the two may be the damaged one, thus each message names both.
    faults = [f'{name} is missing, but {FILE_NAME} lists it' for name in sorted(digests.keys() - present)]
    return faults + [
        f'{name} differs from its digest in {FILE_NAME}'
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
