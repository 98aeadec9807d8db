"""The one exception that stands for a user's mistake, and how its message lists many."""

from collections.abc import Mapping, Sequence

MAX_FAULTS_SHOWN = 20
WORKER_KILLED = 'a worker process was killed, most likely for want of memory: free memory and run again'


class UserError(ValueError):
    """A mistake in the input, the flags or the files that the user can mend.

    The message is one line: what was wrong, the offending value, and the way out. `main.py` prints it on stderr and
    exits with status 1; every other exception is a defect of this project and keeps its traceback.
    """


def join_faults(faults: Sequence[str]) -> str:
    """Returns faults on one line: the first 20, and how many there are in all."""
    shown = '; '.join(faults[:MAX_FAULTS_SHOWN])
    if len(faults) == 1:
        return shown
    more = ', the first 20 shown' if len(faults) > MAX_FAULTS_SHOWN else ''
    return f'{shown} ({len(faults)} in all{more})'


def compare_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns how stored arrays differ from those that a model needs, by name; empty if they fit."""
    faults = [f'missing {name}' for name in sorted(wanted.keys() - stored.keys())]
    faults += [f'left over {name}' for name in sorted(stored.keys() - wanted.keys())]
    return faults + [
        f'{name} has shape {stored[name]}, the model needs {wanted[name]}'
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name]
    ]
