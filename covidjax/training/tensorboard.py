"""Training curves for TensorBoard."""

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
    """Opens an event file; its points replace those of earlier files from `first_step` on.

    tensorboardX's SummaryWriter writes in a thread. A full disk kills that thread silently and then blocks the caller.
    This writer raises the error instead.

    Yields:
      (name, value, step) -> None, which adds a point. With several processes only the first writes.
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
        # On a full disk, closing fails too; the first error is the one to report.
        with contextlib.suppress(OSError):
            writer.close()
