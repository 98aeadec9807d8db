"""The folder of a run, locked to one run at a time."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock

from covidjax.errors import UserError
from covidjax.files import report_write_errors
from covidjax.training.hosts import is_first


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
