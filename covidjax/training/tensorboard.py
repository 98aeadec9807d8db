"""Curves for TensorBoard."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter
from tensorboardX.summary import scalar

from covidjax.training.hosts import is_first


@contextlib.contextmanager
def open_curves(folder: Path, first_step: int) -> Iterator[Callable[[str, float, int], None]]:
    """Opens an event file that replaces the points of earlier ones from `first_step` on.

    tensorboardX's SummaryWriter writes in a thread, which a full disk kills without a word and then blocks the caller;
    here the caller gets the error.

    Yields:
      (name, value, step) -> None: adds a point. Of several processes only the first writes.
    """
    if not is_first():
        yield lambda name, value, step: None
        return
    folder.mkdir(exist_ok=True)
    writer = RecordWriter(str(folder / f'events.out.tfevents.{time.time():.0f}.{socket.gethostname()}'))

    def write(**content) -> None:
        writer.write(Event(wall_time=time.time(), **content).SerializeToString())

    try:
        write(file_version='brain.Event:2')
        write(step=first_step, session_log=SessionLog(status=SessionLog.START))
        yield lambda name, value, step: write(step=step, summary=scalar(name, value))
        writer.flush()
    finally:
        # What a full disk did not take is given up here.
        with contextlib.suppress(OSError):
            writer.close()
