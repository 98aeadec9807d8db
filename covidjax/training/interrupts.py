"""Deferred handling of SIGTERM (Slurm, preemptible machines) and Ctrl-C: training saves its state, then stops."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class Stopped(KeyboardInterrupt):
    """Training was stopped by a signal after saving its state; the message names the step or epoch."""


class StopSignals:
    """Records SIGTERM and Ctrl-C; created by `hold_stop_signals`."""

    def __init__(self):
        self._came = False
        self._at_once = False

    def _note(self, *_) -> None:
        if self._came or self._at_once:
            raise KeyboardInterrupt
        self._came = True

    def is_due(self, num_updates: int) -> bool:
        """Returns whether to save and stop now. Call it after every update.

        With several processes, jax forwards a SIGTERM from any of them, and all stop after the same update.
        """
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(num_updates)
        return self._came

    @contextlib.contextmanager
    def let_through(self) -> Iterator[None]:
        """Lets a signal interrupt this block at once. With several processes, which must agree, the block completes.

        Raises:
          KeyboardInterrupt: a signal came during the block or before it.
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
    """Records the first SIGTERM or Ctrl-C in this block; the second one interrupts.

    Raises:
      KeyboardInterrupt: at the end of the block, if a signal came after the last call of `is_due`.
    """
    signals = StopSignals()
    if jax.process_count() > 1:
        # jax handles SIGTERM; turn Ctrl-C into SIGTERM.
        with _handle([signal.SIGINT], lambda *_: os.kill(os.getpid(), signal.SIGTERM)):
            yield signals
        return
    with _handle([signal.SIGTERM, signal.SIGINT], signals._note):
        yield signals
        with signals.let_through():
            pass


@contextlib.contextmanager
def _handle(signals: list[signal.Signals], handler: Callable) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
