"""Runs of several processes, on one host or many: connect them, and stop when one is lost."""

import ctypes
import logging
import os
import signal
import sys
import threading
from typing import NoReturn

import jax

from covidjax.errors import UserError

CONNECT_TIMEOUT_SECONDS = 300  # jax aborts a process that has waited this long for the others
HEARTBEAT_TIMEOUT_SECONDS = 60  # jax aborts a process this long after another goes silent with open sockets
# At the end the other processes wait this long for the first, which still writes figures and baselines.
SHUTDOWN_TIMEOUT_SECONDS = 3600
LOST_PEER = 'error: another process of the run is gone; repeat the same commands to resume from the last checkpoint'

_ending = threading.Lock()


def end_process(message: str) -> NoReturn:
    """Ends this process at once, with a message on stderr and exit status 1.

    An orderly exit would wait for the other processes while they wait for this one.
    """
    _ending.acquire()  # never released: two threads may find a lost process at the same time
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _end_aborted(_: int) -> None:
    end_process(
        'error: jax ended this process, most likely because another process of the run is gone, silent or never came '
        '(see above); repeat the same commands to resume from the last checkpoint'
    )


def connect(coordinator: str, num_processes: int | None, process_id: int | None) -> None:
    """Connects the processes of a run. Call it before any other function of jax.

    Args:
      coordinator: 'host:port' of the first process, or 'auto' under Slurm, Open MPI, Cloud TPU and GKE, where jax reads
        the addresses from the environment.
      num_processes, process_id: number of processes and index of this one; None under 'auto'.

    Raises:
      UserError: the numbers are inconsistent, or the processes did not connect.
    """
    if coordinator == 'auto':
        if num_processes is not None or process_id is not None:
            raise UserError('--coordinator=auto takes --num_processes and --process_id from the environment: omit them')
        address = None
    else:
        if num_processes is None or process_id is None or not 0 <= process_id < num_processes:
            raise UserError(
                f'--coordinator={coordinator} needs --num_processes, and --process_id from 0 to num_processes - 1 (got '
                f'{num_processes} and {process_id})'
            )
        address = coordinator
    # jax aborts a process whose peers never connect, or are lost without a sum over devices failing first. Only a C
    # handler runs then: a handler set by `signal.signal` would wait for the main thread.
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
    if not is_first():  # only the first process logs
        logging.getLogger('covidjax').setLevel(logging.ERROR)


def is_first() -> bool:
    """Returns whether this is the first process: the one that logs and writes everything but checkpoints."""
    return jax.process_index() == 0


def is_lost_peer(error: Exception) -> bool:
    """Returns whether an error of a computation means that another process of the run is gone."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in ('gloo', 'nccl', 'coordination'))
