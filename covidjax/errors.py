"""The exception for user mistakes, and helpers that list several faults in one message."""

from collections.abc import Mapping, Sequence

MAX_FAULTS_SHOWN = 20
WORKER_KILLED = 'a worker process was killed, most likely for want of memory: free memory and run again'


class UserError(ValueError):
    """A mistake in the input, the flags or the files that the user can fix.

    The message is one line: what is wrong, the offending value and how to fix it. `main.py` prints it on stderr and
    exits with status 1. Every other exception is a bug in this project and keeps its traceback.
    """


class TooLargeError(UserError):
    """An input is larger than this project reads."""


def join_faults(faults: Sequence[str]) -> str:
    """Returns the first 20 faults on one line, and the total count if there are several."""
    shown = '; '.join(faults[:MAX_FAULTS_SHOWN])
    if len(faults) == 1:
        return shown
    more = ', the first 20 shown' if len(faults) > MAX_FAULTS_SHOWN else ''
    return f'{shown} ({len(faults)} in all{more})'


def compare_shapes(stored: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Returns the differences between stored and required array shapes, by array name; empty if they match."""
    faults = [f'missing {name}' for name in sorted(wanted.keys() - stored.keys())]
    faults += [f'left over {name}' for name in sorted(stored.keys() - wanted.keys())]
    return faults + [
        f'{name} has shape {stored[name]}, the model needs {wanted[name]}'
        for name in sorted(wanted.keys() & stored.keys())
        if stored[name] != wanted[name]
    ]
