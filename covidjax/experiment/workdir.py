"""The folder of a run, locked to one run at a time, and the folders of the folds of a cross-validation."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import filelock

from covidjax.errors import UserError
from covidjax.files import report_write_errors
from covidjax.training.hosts import is_first

FOLDS = 'folds.json'  # in the workdir of a cross-validation


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Creates the workdir if absent and locks it; with several processes the first one holds the lock.

    Raises:
      UserError: the workdir cannot be created or written, or another run is using it.
    """
    if not is_first():
        yield
        return
    with report_write_errors(workdir, '--workdir'):
        workdir.mkdir(parents=True, exist_ok=True)
        try:
            held = filelock.FileLock(workdir / '.lock').acquire(timeout=0)
        except filelock.Timeout as error:
            raise UserError(f'another run is using {workdir}: wait for it, or choose another --workdir') from error
    with held:
        yield


def list_folds(workdir: Path) -> list[Path]:
    """Returns the workdirs of the folds of a cross-validation, in order; none for any other folder.

    Raises:
      UserError: folds.json is damaged.
    """
    path = workdir / FOLDS
    try:
        return [workdir / f'fold_{number}' for number in range(1, len(json.loads(path.read_text())['folds']) + 1)]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} is unreadable ({error}): put a copy back, or choose another --workdir') from error
