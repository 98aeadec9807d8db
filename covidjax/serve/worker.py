"""The process that predicts. What a scan does to a decoder, or to memory, ends this process and not the server."""

import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from covidjax.data.preprocess import exit_with_parent
from covidjax.errors import TooLargeError, UserError
from covidjax.serve.limits import Limits, Refused, format_bytes

_POLL_SECONDS = 0.05
_START_SECONDS = 300
_DELETED = Refused(404, 'deleted', 'The scan was deleted.')
_HINT = ' (--force'  # doubts end with it, see predict/prepare.py
_ONLY_FILE = re.compile(r'^0*1(\.\w+)*: ')  # the name of a single file, see upload.py


class Job(NamedTuple):
    """A prediction to make.

    Attributes:
      source: folder of the uploaded files; a single file is read as such.
      results: existing folder for the results.
      series: DICOM series to read, None for the best.
      force: predicts in spite of doubts.
      dicom: also writes DICOM results.
    """

    source: Path
    results: Path
    series: str | None
    force: bool
    dicom: bool = False


Predict = Callable[[Job, Callable[[str], None]], None]
"""Predicts a job and calls the second argument with the name of each stage. Raises UserError for a refused scan."""

Load = Callable[[Path | None], tuple[dict[str, Any], Predict]]
"""Workdir of a run, or None for the lesion model of this package -> facts on the model for the page, and how it
predicts. Raises UserError for a bad run.
"""


def load_run_once(workdir: Path | None) -> tuple[dict[str, Any], Predict]:
    """Loads a run, in the worker alone: jax takes seconds and memory that the server does not need."""
    from covidjax.serve.predictor import load_predictor

    return load_predictor(workdir)


class Worker:
    """The server's end of the process that predicts. The process starts at the first use, and again after its end.

    Args:
      load: how the run is loaded; a function of a module, which the process imports.
      workdir: see `runs.load_run`.
      limits: of time and memory.
      dicom: all jobs get DICOM results.
    """

    def __init__(self, load: Load, workdir: Path | None, limits: Limits, *, dicom: bool = False):
        self._load, self._workdir, self._limits, self._dicom = load, workdir, limits, dicom
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None
        self.num_starts = 0

    def start(self) -> dict[str, Any]:
        """Starts the process and returns the facts on the model.

        Raises:
          UserError: the run can't be loaded.
        """
        context = multiprocessing.get_context('spawn')
        self._connection, other = context.Pipe()
        self._process = context.Process(
            target=_work, args=(other, self._load, self._workdir, os.getpid()), name='covidjax-predict', daemon=True
        )
        self._process.start()
        other.close()
        self.num_starts += 1
        if not self._connection.poll(_START_SECONDS):
            self.stop()
            raise UserError(f'the run was not loaded within {_START_SECONDS} s: is the machine busy?')
        try:
            kind, value = self._connection.recv()
        except EOFError as error:
            self.stop()
            raise UserError('the process that loads the run died: is there enough memory?') from error
        if kind == 'failed':
            self.stop()
            raise UserError(value)
        return value

    def stop(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = self._connection = None

    @property
    def memory_bytes(self) -> int:
        """Resident memory of the process; 0 where the system does not tell."""
        try:
            pages = int(Path(f'/proc/{self._process.pid}/statm').read_text().split()[1])
        except (OSError, AttributeError):
            return 0
        return pages * os.sysconf('SC_PAGE_SIZE')

    def predict(self, job: Job, report_stage: Callable[[str], None], is_deleted: Callable[[], bool]) -> None:
        """Predicts a job in the process.

        Args:
          job: the prediction.
          report_stage: gets the name of each stage.
          is_deleted: whether nobody wants the result any more.

        Raises:
          Refused: the scan is refused, or the process had to be ended.
        """
        try:
            if self._process is None:
                self.start()
            self._connection.send(job._replace(dicom=self._dicom))
        except (UserError, OSError) as error:
            self.stop()
            raise Refused(422, 'model', 'The model could not be started. Ask who runs this server.') from error
        start = time.monotonic()
        while True:
            try:
                while self._connection.poll(_POLL_SECONDS):
                    kind, value = self._connection.recv()
                    if kind == 'done':
                        return
                    if kind == 'refused':
                        raise value
                    report_stage(value)
            except (EOFError, OSError) as error:
                self.stop()
                raise Refused(
                    422, 'crash', 'Reading this scan crashed the decoder. The files may be damaged: export them again.'
                ) from error
            if is_deleted():
                self.stop()
                raise _DELETED
            if time.monotonic() - start > self._limits.predict_seconds:
                self.stop()
                limit = f'{self._limits.predict_seconds:g} s'
                raise Refused(422, 'time', f'The prediction took longer than {limit}. Upload a single series.')
            if self.memory_bytes > self._limits.memory_bytes:
                self.stop()
                limit = format_bytes(self._limits.memory_bytes)
                raise Refused(413, 'memory', f'This scan needs more than {limit} of memory. Upload a single series.')


def _work(connection: Connection, load: Load, workdir: Path | None, parent: int) -> None:
    """Loads the run and predicts until the server ends. Main function of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the server, which ends this process
    exit_with_parent(parent)
    try:
        about, predict = load(workdir)
    except UserError as error:
        connection.send(('failed', str(error)))
        return
    connection.send(('ready', about))
    # Decoders in C quote headers in their messages, and a log must not name a patient.
    null = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(null, stream)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            predict(job, lambda stage: connection.send(('stage', stage)))
        except Exception as error:
            connection.send(('refused', describe_refusal(error, job)))
        else:
            connection.send(('done', None))


def describe_refusal(error: Exception, job: Job) -> Refused:
    """Turns an error into the answer to a client: without paths of the server and flags of the command line."""
    if isinstance(error, UserError):
        folder = str(job.source)
        message = str(error).removeprefix(f'{folder}: ').replace(f'{folder}/', '').replace(folder, 'the upload')
        message = _ONLY_FILE.sub('', message)
        doubts, hint, _ = message.partition(_HINT)
        message = f'{doubts[0].upper()}{doubts[1:].rstrip(".")}'.replace('with --series', 'by its number')
        message += '' if message.endswith('?') else '.'
        if isinstance(error, TooLargeError):
            return Refused(413, 'unpacked', message)
        return Refused(422, 'doubts' if hint else 'input', message, can_force=bool(hint))
    if isinstance(error, MemoryError):
        return Refused(413, 'memory', 'There is not enough memory for this scan. Upload a single series.')
    # The message of an unexpected error may quote a header, so only its place is told.
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f'{type(error).__name__} in {Path(place.filename).name}, line {place.lineno}'
    return Refused(422, 'error', f'Unexpected error ({where}). Please report it.')
