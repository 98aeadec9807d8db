"""Tasks for workers, one of which dies on one unit. In a module of its own, since workers import it."""

import os
import signal
import time

from covidjax.predict.tasks import UnitResult

_kept = []


def read(unit):
    """Returns the name of a unit; kills the process for the unit 'bad'."""
    if unit.name == 'bad':
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return UnitResult([unit.name], [], 0)


def grow(unit):
    """Returns the ID of the process, which keeps 400 MB more after its first task."""
    _kept.append(bytearray(1 if not _kept else 400_000_000 if len(_kept) == 1 else 1))
    _kept[-1][::4096] = bytes(len(_kept[-1][::4096])).replace(b'\0', b'\1')
    time.sleep(1.1)  # loky measures once a second
    return UnitResult([os.getpid()], [], 0)
