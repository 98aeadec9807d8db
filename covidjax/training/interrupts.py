"""Requests to stop, SIGTERM (Slurm, preemptible machines) and Ctrl-C, kept until the state can be saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
    """Training was stopped on request and its state is saved; the message says where."""


class StopSignals:
    """SIGTERM and Ctrl-C as they come; made by `hold_stop_signals`."""

    def __init__(self):
        self._came = False
        self._at_once = False

    def _note(self, *_) -> None:
        if self._came or self._at_once:
            raise KeyboardInterrupt
        self._came = True

    def is_due(self, num_updates: int) -> bool:
        """Says whether to save and stop now; to be asked after every update.

        Several processes agree on one update: jax tells all of them of a SIGTERM that any of them gets.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(num_updates)
        return self._came

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """Lets a signal interrupt this block at once; several processes, which must agree, go through it to its end.

        Raises:
          KeyboardInterrupt: one came, or had come before.
        """
        self._at_once = jax.process_count() == 1
        try:
            if self._came and self._at_once:
                raise KeyboardInterrupt
            yield
        finally:
            self._at_once = False


@contextlib.contextmanager
def hold_stop_signals() -> Iterator[StopSignals]:
    """Keeps SIGTERM and Ctrl-C from interrupting the block; a second one does.

    Raises:
      KeyboardInterrupt: at the end of the block, if one came too late to be asked for.
    """
    signals = StopSignals()
    if jax.process_count() > 1:
        # jax keeps SIGTERM; Ctrl-C joins it.
        with _handle([signal.SIGINT], lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            yield signals
        return
    with _handle([signal.SIGTERM, signal.SIGINT], signals._note):
        yield signals
        with signals.let_through():
            pass


@contextlib.contextmanager
def _handle(signals: list[signal.Signals], handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
