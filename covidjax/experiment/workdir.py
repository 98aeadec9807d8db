"""The folder of a run: locked to one run at a time, and tied to one config."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import filelock
from ml_collections import ConfigDict

from covidjax.errors import UserError
from covidjax.experiment.config import add_later_fields, flatten_config
from covidjax.files import report_write_errors, write_json
from covidjax.training.hosts import is_first

# These fields do not change the results.
_MAY_DIFFER = ('data.prepared_dir', 'train.checkpoint_steps', 'att2.train.checkpoint_steps')


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


def check_workdir(workdir: Path, config: ConfigDict) -> None:
    """Checks that a workdir is new or belongs to the same config.

    Raises:
      UserError: the workdir holds a run with another config; the differences are listed.
    """
    if not (workdir / 'config.json').exists():
        return
    flat, saved = flatten_config(config), flatten_config(load_config(workdir))
    differences = [
        f'{name} was {saved.get(name, "absent")!r}, now {flat.get(name, "absent")!r}'
        for name in sorted(saved.keys() | flat.keys())
        if saved.get(name) != flat.get(name) and name not in _MAY_DIFFER
    ]
    if differences:
        raise UserError(
            f'{workdir} holds a run with another config ({"; ".join(differences)}): choose another --workdir, or '
            'pass the same fields again'
        )


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Saves the config of a run.

    Call it after loading the data, so that a mistyped command does not claim the workdir.
    """
    if is_first():
        write_json(workdir / 'config.json', config.to_dict())


def load_config(workdir: Path) -> ConfigDict:
    """Returns the config saved in a workdir.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = workdir / 'config.json'
    try:
        config = ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError as error:
        raise UserError(f'{workdir} is not the workdir of a run (it has no config.json)') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is unreadable ({error}): put a copy back, or choose another --workdir') from error
    add_later_fields(config)
    return config.lock()
