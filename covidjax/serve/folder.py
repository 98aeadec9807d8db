"""The private folder of a server, which disappears with it; at the latest when the next server starts."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from covidjax.errors import UserError


@contextlib.contextmanager
def open_folder() -> Iterator[Path]:
    """Yields a new folder that only this user can enter, and deletes it afterwards.

    It lies in covidjax-serve-<user> of the system's folder for temporary files. Each server holds a lock on its own,
    which the system releases when the server ends in any way, and deletes the folders whose lock is free.

    Raises:
      UserError: that place belongs to another user.
    """
    place = Path(tempfile.gettempdir(), f'covidjax-serve-{os.getuid()}')
    try:
        place.mkdir(mode=0o700, exist_ok=True)
        status = place.lstat()
        if place.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise UserError(f'{place} is not a private folder of this user: delete it, or set TMPDIR')
        with filelock.FileLock(place / 'lock'):
            _delete_leftovers(place)
            folder = Path(tempfile.mkdtemp(dir=place, prefix='server-'))
            own = filelock.FileLock(_get_lock(folder))
            own.acquire()
    except OSError as error:
        raise UserError(f'cannot write to {place} ({error.strerror}): set TMPDIR to another folder') from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        own.release()
        _get_lock(folder).unlink(missing_ok=True)


def _get_lock(folder: Path) -> Path:
    return folder.with_name(f'{folder.name}.lock')


def _delete_leftovers(place: Path) -> None:
    """Deletes the folders of servers that ended without doing so."""
    for folder in filter(Path.is_dir, place.iterdir()):
        lock = filelock.FileLock(_get_lock(folder))
        with contextlib.suppress(filelock.Timeout), lock.acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
            _get_lock(folder).unlink(missing_ok=True)
