"""The folder of a run: one run at a time, and always the same config."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import filelock
from ml_collections import ConfigDict

from covidjax.errors import UserError
from covidjax.files import write_json
from covidjax.training.config import flatten_config

# Where prepared slices lie changes no result.
_MAY_DIFFER = ('data.prepared_dir',)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Creates the workdir if absent and keeps other runs out of it.

    Raises:
      UserError: it can't be created or written, or another run is in it.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(workdir / '.lock')
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f'another run is using {workdir}: wait for it, or choose another --workdir') from error
    except OSError as error:
        raise UserError(f'can not write to {workdir} ({error.strerror}): choose another --workdir') from error
    with lock:
        yield


def claim_workdir(workdir: Path, config: ConfigDict) -> None:
    """Saves the config in a new workdir, or checks that an old one was made by the same.

    Raises:
      UserError: the workdir holds a run with other fields; the differences are listed.
    """
    path = workdir / 'config.json'
    if not path.exists():
        write_json(path, config.to_dict())
        return
    flat = flatten_config(config)
    saved = flatten_config(load_config(workdir))
    differences = [
        f'{name} was {saved.get(name, "absent")!r}, now {flat.get(name, "absent")!r}'
        for name in sorted(saved.keys() | flat.keys())
        if saved.get(name) != flat.get(name) and name not in _MAY_DIFFER
    ]
    if differences:
        raise UserError(
            f'{workdir} holds a run with another config ({"; ".join(differences)}): choose another --workdir, or '
            'repeat the fields it was made with'
        )


def load_config(workdir: Path) -> ConfigDict:
    """Returns the config saved in a workdir.

    Raises:
      UserError: there is none.
    """
    path = workdir / 'config.json'
    try:
        return ConfigDict(json.loads(path.read_text())).lock()
    except FileNotFoundError as error:
        raise UserError(f'{workdir} is not the workdir of a run (it has no config.json)') from error
    except (OSError, ValueError) as error:
        raise UserError(f'{path} is unreadable: {error}') from error
