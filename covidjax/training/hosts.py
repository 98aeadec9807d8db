"""A run of several processes, on one host or many: connecting them, and stopping when one is lost."""

import ctypes
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

import jax

from covidjax.errors import UserError

CONNECT_TIMEOUT_SECONDS = 300  # jax ends a process that has waited this long for another to appear
HEARTBEAT_TIMEOUT_SECONDS = 60  # jax ends a process this long after another went silent without closing its sockets
# The others wait this long at their end for the first, which writes figures and baselines meanwhile.
SHUTDOWN_TIMEOUT_SECONDS = 3600
LOST_PEER = 'error: another process of the run is gone; the same commands go on from the last checkpoint'

_ending = threading.Lock()


def end_process(message: str) -> NoReturn:
    """Ends this process at once, with a message on stderr and exit status 1.

    The others shall see it gone: an orderly exit would wait for them while they wait for it.
    """
    _ending.acquire()  # for good: two threads may find at the same time that another process is gone
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_aborted(_: int) -> None:
    end_process(
        'error: jax ended this process, most likely since another process of the run is gone, silent or never came '
        '(see above); the same commands go on from the last checkpoint'
    )


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run; call it before anything else of jax.

    Args:
      coordinator: 'host:port' of the first process, or 'auto' under Slurm, Open MPI, Cloud TPU and GKE, where jax finds
        all it needs by itself.
      num_processes, process_id: how many there are and which this one is; None under 'auto'.

    Raises:
      UserError: numbers that do not fit, or an environment that tells nothing.
    """
    if coordinator == 'auto':
        if num_processes is not None or process_id is not None:
            raise UserError('--coordinator=auto takes --num_processes and --process_id from the environment: omit them')
        address = None
    else:
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise UserError(
                f'--coordinator={coordinator} needs --num_processes and --process_id between 0 and that less one (got '
                f'{num_processes} and {process_id})'
            )
        address = coordinator
    # jax aborts a process whose others do not appear, or are lost and no sum over devices fails first. Only a C handler
    # runs then: one that `signal.signal` sets waits for the main thread.
    ctypes.pythonapi.PyOS_setsig(signal.SIGABRT, _end_aborted)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=CONNECT_TIMEOUT_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECONDS,
        )
    except (RuntimeError, ValueError) as error:
        raise UserError(f'--coordinator={coordinator}: the processes did not connect: {error}') from error
    if not is_first():  # which speaks for all
        logging.getLogger('covidjax').setLevel(logging.ERROR)


def is_first() -> bool:
    """Says whether this process logs, reports and writes what is not a checkpoint."""
    return jax.process_index() == 0


def is_lost_peer(error: Exception) -> bool:
    """Says whether an error of a computation means that another process of the run is gone."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in ('gloo', 'nccl', 'coordination'))
