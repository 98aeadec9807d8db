"""A task for workers that dies on one unit. In a module of its own, since workers import it."""

import os
import signal
import time

from covidjax.predict.tasks import UnitResult


def read(unit):
    """Returns the name of a unit; kills the process for the unit 'bad'."""
    if unit.name == 'bad':
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGKILL)
    return UnitResult([unit.name], [], 0)
