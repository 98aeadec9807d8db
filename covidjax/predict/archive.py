"""A whole archive becomes one table: workers prepare scans ahead of the model, which mixes them in its batches.

All work goes through one call of joblib, on this host or on a Dask cluster. A unit (see `units.py`) is a task. What a
crash interrupts is repeated; what is done is skipped.
"""

import contextlib
import functools
import itertools
import logging
import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import joblib
from joblib.externals import loky

import covidjax
from covidjax.errors import WORKER_KILLED, UserError
from covidjax.evaluation.outputs import ROUND_SIZE, OutputQueue
from covidjax.experiment.runs import Run, load_run
from covidjax.files import replace_file, report_full_disk, report_write_errors, write_json
from covidjax.predict import tables, tasks
from covidjax.predict.prepare import stack_images
from covidjax.predict.scan import compute_version, conclude, create_recipe
from covidjax.predict.tables import DONE, FAILURES, PREDICTIONS, Table, create_row
from covidjax.predict.units import Unit, list_units, select_shard
from covidjax.progress import open_progress
from covidjax.report.burden import LesionPrediction
from covidjax.report.prediction import Prediction

log = logging.getLogger(__name__)

PAGES = ('all', 'positive', 'none')
BACKEND = 'loky'  # of joblib, on this host
MAX_AHEAD = 2  # units for each worker that are read or wait for the model; bounds the memory
MAX_CRASHES = 5  # without a result between them
_DICOM = 'dicom'  # file in it: there are DICOM results
STATE = '.state'  # folder below --output: locks, and the tables of shards and of finished units


class Task(NamedTuple):
    """Work for a worker.

    Attributes:
      number: of the task.
      unit: what is read; None for a page.
      call: function and its arguments, for joblib.
      started: seconds of a monotonic clock.
    """

    number: int
    unit: Unit | None
    call: Any
    started: float


def predict_archive(
    workdir: Path | None,
    archive: Path,
    output: Path,
    *,
    pages: str = 'all',
    shard: str | None = None,
    scheduler: str | None = None,
    force: bool = False,
    dicom: bool = False,
    windows: int = 3,
) -> bool:
    """Predicts every chest CT of an archive; returns whether none failed.

    Writes predictions.csv and failures.csv, and prediction.json and prediction.html of each scan in a folder named by
    its id. The same command goes on where an earlier one ended.

    Args:
      workdir: see `runs.load_run`.
      archive: folder, or text file of paths.
      output: folder for all results.
      pages: scans that get a page, one of `PAGES`.
      shard: 'k/n' for part k of n; None for everything.
      scheduler: address of a Dask scheduler; None for this host.
      force: predicts in spite of doubts.
      dicom: also writes DICOM results into dicom/ of the folder of each scan, refused ones included.
      windows: see `scan.create_recipe`.

    Raises:
      UserError: the run, the archive or the output is no good, or the output holds predictions of another run, or with
        or without DICOM results in contrast to `dicom`.
    """
    if pages not in PAGES:
        raise UserError(f'--pages={pages}: it must be {", ".join(PAGES)}')
    part = _parse_shard(shard)
    run = load_run(workdir)
    versions = {'run': compute_version(run, windows), 'program': covidjax.__version__}
    units = select_shard(list_units(archive), part)
    suffix = '' if part == (1, 1) else f'-{part[0]}-of-{part[1]}'
    state = output / STATE
    with report_write_errors(output, '--output'):
        state.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(state / f'lock{suffix}')
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise UserError(f'{output} is in use by another command: wait for it, or choose another --output') from error
    with lock, report_write_errors(output, '--output'), report_full_disk(output), warnings.catch_warnings():
        # loky warns of each worker that it replaces, see `preprocess.set_up_worker`; no task is lost by that.
        warnings.filterwarnings('ignore', 'A worker stopped while some jobs were given', UserWarning)
        job = _Job(run, workdir, output, suffix, versions, pages, force, scheduler, dicom, windows)
        return job.run_units(units)


def _parse_shard(shard: str | None) -> tuple[int, int]:
    try:
        number, count = map(int, (shard or '1/1').split('/'))
    except ValueError:
        number, count = 0, 0
    if not 1 <= number <= count:
        raise UserError(f'--shard={shard}: it must be k/n with k from 1 to n, e.g. 3/8')
    return number, count


class _Job:
    """One pass over the units of an archive."""

    def __init__(
        self,
        run: Run,
        workdir: Path | None,
        output: Path,
        suffix: str,
        versions: dict[str, str],
        pages: str,
        force: bool,
        scheduler: str | None,
        dicom: bool,
        windows: int,
    ):
        self._run, self._workdir, self._output, self._versions = run, workdir, output, versions
        self._pages, self._force, self._scheduler, self._suffix = pages, force, scheduler, suffix
        self._windows = windows
        own = output if not suffix else output / STATE
        self._predictions = Table(own / f'predictions{suffix}.csv', PREDICTIONS)
        self._failures = Table(own / f'failures{suffix}.csv', FAILURES)
        self._done = Table(output / STATE / f'units{suffix}.csv', DONE)
        known = self._predictions.rows + [row for path in self._list_tables('predictions') for row in _peek(path)]
        others = {(row['run'], row['program']) for row in known} - {tuple(versions.values())}
        if others:
            of = ', '.join(f'run {run}, covidjax {program}' for run, program in sorted(others))
            raise UserError(f'{output} holds predictions of another run or version ({of}): choose another --output')
        self._maker = self._describe_maker(bool(known)) if dicom else None
        if not dicom and (output / STATE / _DICOM).exists():
            raise UserError(f'{output} holds predictions with DICOM results: pass --dicom, or choose another --output')
        self._known = frozenset((row['path'], row['id']) for row in known)
        self._refused: list[tasks.Refusal] = []
        self._queue = OutputQueue([(member.slice_model, member.folded) for member in run.members])
        self._keys = itertools.count()
        self._waiting: dict[int, tasks.Prepared] = {}  # for the model, by key
        self._open: dict[str, set[int]] = {}  # keys of the scans of a unit that are not written, by its name
        self._faulty: set[str] = set()  # units with a refusal
        self._units: dict[str, Unit] = {}
        self._num_new = self._num_known = self._num_empty = self._num_without_dicom = 0
        self._seconds = dict.fromkeys(('model', 'waiting', 'writing'), 0.0)

    def _describe_maker(self, has_rows: bool) -> dict[str, str]:
        """Returns who makes the DICOM results. What was predicted without them would stay without."""
        from covidjax.predict.dicom_results import describe_maker

        marker = self._output / STATE / _DICOM
        if has_rows and not marker.exists():
            raise UserError(f'{self._output} holds predictions without DICOM results: choose another --output')
        marker.touch()
        return describe_maker(self._run.results, self._versions['run'])

    def _list_tables(self, name: str) -> list[Path]:
        """Returns the tables of the whole and of all shards, less the own one."""
        own = self._predictions.path if name == 'predictions' else self._failures.path
        found = [self._output / f'{name}.csv', *sorted((self._output / STATE).glob(f'{name}-*.csv'))]
        return [path for path in found if path != own and path.exists()]

    def run_units(self, units: list[Unit]) -> bool:
        """Predicts the scans of units and closes the tables."""
        versions = tuple(self._versions.values())
        paths = [self._done.path, *(self._output / STATE).glob('units*.csv')]
        done = {
            (row['path'], row['signature'])
            for path in dict.fromkeys(paths)
            for row in (self._done.rows if path == self._done.path else _peek(path))
            if (row['run'], row['program']) == versions
        }
        todo = [unit for unit in units if (unit.name, unit.signature) not in done]
        start = time.monotonic()
        pool = _Pool(todo, self._scheduler, self._create_call, with_pages=self._pages != 'none')
        try:
            with open_progress('archive', len(units), 'unit', initial=len(units) - len(todo)) as progress:
                count = 0
                # An error here must stop the workers at once, not when the generator is collected.
                with contextlib.closing(pool.run(self._work, lambda: len(self._waiting))) as outcomes:
                    for outcome in outcomes:
                        self._take(*outcome, pool)
                        if outcome[0].unit is not None:
                            count += 1
                            left = (time.monotonic() - start) / count * (len(todo) - count)
                            progress.update()
                            progress.set_postfix_str(f'{left / 60:.0f} min left')
        except KeyboardInterrupt:
            message = f'{len(self._predictions.rows):,} rows are in {self._predictions.path}'
            raise KeyboardInterrupt(message) from None
        seconds = time.monotonic() - start
        self._seconds['waiting'] = pool.seconds_waiting
        self._close_tables()
        self._report(seconds, len(units) - len(todo))
        return not self._failures.rows

    def _create_call(self, unit: Unit) -> Any:
        """Returns the task that reads a unit."""
        known = frozenset(key for key in self._known if key[0] == unit.name or unit.more)
        if self._scheduler is None:
            call = joblib.delayed(tasks.prepare_unit)
            recipe = create_recipe(self._run, self._windows)
            return call(unit, recipe, known, force=self._force, maker=self._maker, main_pid=os.getpid())
        call = joblib.delayed(tasks.predict_unit)
        workdir = self._workdir and str(self._workdir.resolve())
        options = {'force': self._force, 'pages': self._pages, 'windows': self._windows, 'maker': self._maker}
        return call(unit, workdir, known, **options)

    def _take(self, task: Task, result: Any, pool: '_Pool') -> None:
        """Takes the result of a task: a `UnitResult`, or the (key, `Finished`) of a page."""
        if task.unit is None:
            self._write(*result)
            return
        name = task.unit.name
        self._units[name] = task.unit
        self._open[name] = set()
        for refusal in result.refusals:
            self._refuse(name, refusal)
        self._num_known += result.num_known
        self._num_empty += not (result.scans or result.refusals or result.num_known)
        scans = {next(self._keys): scan for scan in result.scans}
        self._open[name].update(scans)
        if not scans:
            self._close_unit(name)
        for key, scan in scans.items():
            if isinstance(scan, tasks.Finished):
                self._write(key, scan)
            else:
                self._waiting[key] = scan
                self._queue.add(key, stack_images(scan.scan))

    def _work(self, pool: '_Pool') -> None:
        """Runs the model over what is ready: full batches, and the rest once nothing else is read."""
        while self._queue.num_slices >= ROUND_SIZE or (self._queue.num_slices and not pool.is_reading):
            start = time.monotonic()
            count = min(ROUND_SIZE, self._queue.num_slices)
            complete = self._queue.compute_batch()
            seconds = time.monotonic() - start
            self._seconds['model'] += seconds
            for key, outputs in complete:
                prepared = self._waiting[key]
                share = seconds / count * prepared.scan.num_images
                prepared = prepared._replace(seconds=prepared.seconds | {'model': share})
                prediction = conclude(self._run, prepared.scan, outputs)
                # A page needs neither the slices nor the grids, which would be copied to its worker.
                scan = prepared.scan._replace(images=prepared.scan.images[:0], whole=None, views=None)
                light = prepared._replace(scan=scan)
                light, prediction = lighten(light, prediction, with_outlines=bool(light.headers))
                finish = functools.partial(tasks.finish_scan, light, prediction, self._run.results, maker=self._maker)
                if light.headers or tasks.has_page(prediction.summary, self._pages):
                    pool.add_page(joblib.delayed(_finish)(key, finish, self._pages))
                else:
                    self._write(key, finish(pages='none'))
                del self._waiting[key]

    def _write(self, key: int, finished: tasks.Finished) -> None:
        """Writes the files of a scan and then its row."""
        start = time.monotonic()
        summary = finished.summary
        folder = self._output / tables.get_id(summary['input']['sha256'])
        folder.mkdir(exist_ok=True)
        if finished.page is not None:
            with replace_file(folder / 'prediction.html') as temporary:
                temporary.write_text(finished.page)
        write_json(folder / 'prediction.json', summary)
        self._write_dicom(folder, finished.dicom)
        self._predictions.append(create_row(finished.path, finished.series, summary) | self._versions)
        self._num_new += 1
        self._seconds['writing'] += time.monotonic() - start
        for name, keys in list(self._open.items()):
            if key in keys:
                keys.remove(key)
                self._close_unit(name)

    def _write_dicom(self, folder: Path, files: Mapping[str, bytes]) -> None:
        if self._maker is None:
            return
        if not files:
            self._num_without_dicom += 1
            return
        from covidjax.predict.dicom_results import write_files

        write_files(folder / 'dicom', files)

    def _close_unit(self, name: str) -> None:
        """Remembers a unit of which everything is written, so that it is not read again."""
        if self._open[name]:
            return
        del self._open[name]
        if name not in self._faulty:
            self._done.append({'path': name, 'signature': self._units[name].signature} | self._versions)

    def _refuse(self, name: str, refusal: tasks.Refusal) -> None:
        self._faulty.add(name)
        self._refused.append(refusal)
        self._failures.append(refusal._asdict() | self._versions)
        if refusal.dicom:
            folder = self._output / refusal.id
            folder.mkdir(exist_ok=True)
            self._write_dicom(folder, refusal.dicom)
        log.info('%s%s: %s', refusal.path, refusal.series and f', series {refusal.series}', refusal.reason)

    def _close_tables(self) -> None:
        """Sorts the tables, keeps of the failures those of this pass, and joins shards to the tables of the whole."""
        key = ('path', 'id')
        self._predictions.replace(tables.merge_rows(self._predictions.rows, lambda row: tuple(row[k] for k in key)))
        fresh = self._failures.rows[len(self._failures.rows) - len(self._refused) :]
        self._failures.replace(tables.merge_rows(fresh, lambda row: (row['path'], row['series'])))
        with filelock.FileLock(self._output / STATE / 'lock-tables'):
            predictions = [row for path in self._list_tables('predictions') for row in _peek(path)]
            predictions += self._predictions.rows
            failures = [row for path in self._list_tables('failures') for row in _peek(path)]
            if self._suffix:
                shards = [path for path in self._list_tables('failures') if path.parent.name == STATE]
                failures = [row for path in shards for row in _peek(path)]
            failures = failures + self._failures.rows if self._suffix else self._failures.rows
            merged = tables.merge_rows(predictions, lambda row: tuple(row[k] for k in key))
            tables.write_rows(self._output / 'predictions.csv', PREDICTIONS, merged)
            merged = tables.merge_rows(failures, lambda row: (row['path'], row['series']))
            tables.write_rows(self._output / 'failures.csv', FAILURES, merged)

    def _report(self, seconds: float, num_skipped: int) -> None:
        speed = f', {3600 * self._num_new / seconds:,.0f} scans an hour' if self._num_new else ''
        shares = ''
        if self._num_new and self._scheduler is None:
            model, waiting = (self._seconds[name] / seconds for name in ('model', 'waiting'))
            shares = f'; the model ran {model:.0%} of the time and waited for data {waiting:.0%}'
        count = self._num_without_dicom
        without = f'; {count:,} without DICOM results, as nothing can refer to their slices' if count else ''
        table = self._output / 'predictions.csv'
        print(
            f'{len(self._predictions.rows):,} scans{self._suffix and " of this part"} in {table}, '
            f'{self._num_new:,} of them new; '
            f'{len(self._failures.rows):,} failures in {self._output / "failures.csv"}; '
            f'{self._num_empty:,} folders or files without a chest CT, {num_skipped:,} skipped as done; '
            f'{seconds:.0f} s{speed}{shares}{without}',
            flush=True,
        )


def _finish(key: int, finish: Callable[..., tasks.Finished], pages: str) -> tuple[int, tasks.Finished]:
    return key, finish(pages=pages)


def lighten(
    prepared: tasks.Prepared, prediction: Prediction | LesionPrediction, *, with_outlines: bool
) -> tuple[tasks.Prepared, Prediction | LesionPrediction]:
    """Drops the grids that a page does not need, which would be copied to its worker. DICOM needs the outlines."""
    volume, outlined = prepared.scan.volume, prediction.outlined
    if outlined is None or not with_outlines:
        volume = volume._replace(lungs=None)
    elif volume.lungs is not None:
        volume = volume._replace(lungs=volume.lungs._replace(hu_txhxw=volume.lungs.hu_txhxw[:0]))
    if outlined is not None and not with_outlines:
        outlined = outlined._replace(burden=None, probabilities=None)
    prepared = prepared._replace(scan=prepared.scan._replace(volume=volume))
    return prepared, prediction._replace(outlined=outlined)


def _peek(path: Path) -> list[tables.Row]:
    """Returns the rows of a table that another command may be writing; does not repair it."""
    return tables.parse_rows(path.read_bytes())


class _Stuck(Exception):
    """A worker does not return."""


def _is_crash(error: BaseException) -> bool:
    """Returns whether a worker died: of loky, or of Dask, which need not be installed."""
    names = ('KilledWorker', 'CommClosedError', 'FutureCancelledError', 'CancelledError')
    return isinstance(error, (BrokenExecutor, _Stuck)) or type(error).__name__ in names


class _Pool:
    """Hands tasks to workers, pages first, and repeats what a crash interrupted.

    joblib fetches a task whenever a worker is free. While there is nothing to do, or what is read would get too far
    ahead of the model, workers get tasks that wait: fetching must never block.

    Args:
      units: to read.
      scheduler: of Dask; None for processes of this host.
      create_call: returns the task of a unit.
      with_pages: pages will be added.
    """

    def __init__(
        self, units: list[Unit], scheduler: str | None, create_call: Callable[[Unit], Any], *, with_pages: bool
    ):
        self._units, self._pages, self._suspects = deque(units), deque(), deque()
        self._scheduler, self._create_call, self._with_pages = scheduler, create_call, with_pages
        self._numbers, self._running = itertools.count(), {}
        self._num_crashes = 0  # since the last result
        self._is_careful = False  # a worker died: one unit at a time, to find which
        self._get_num_waiting: Callable[[], int] = lambda: 0
        self.seconds_waiting = 0.0

    @property
    def is_reading(self) -> bool:
        """Whether units are read or will be."""
        return bool(self._units or self._suspects or any(task.unit for task in list(self._running.values())))

    def add_page(self, call: Any) -> None:
        """Adds the task of a page."""
        self._pages.append(call)

    def run(self, work: Callable[['_Pool'], None], count_waiting: Callable[[], int]) -> Iterator[tuple[Task, Any]]:
        """Yields each task with its result; calls `work` whenever something came back.

        Args:
          work: runs the model.
          count_waiting: returns how many scans wait for the model.
        """
        self._get_num_waiting = count_waiting
        while self._units or self._suspects or self._pages or self._running or count_waiting():
            results = self._start()
            try:
                while True:
                    start = time.monotonic()
                    found = next(results, None)
                    if self.is_reading:
                        self.seconds_waiting += time.monotonic() - start
                    if found is None:
                        break
                    number, result = found
                    if number is not None:
                        task = self._running[number]
                        yield task, result
                        work(self)
                        del self._running[number]
                        work(self)  # the last units may be read now
                        self._is_careful, self._num_crashes = bool(self._suspects), 0
                    self._check_time()
            except Exception as error:
                if not _is_crash(error):
                    raise
                yield from self._handle_crash(error)
                work(self)
            finally:
                self._stop(results)

    def _start(self) -> Iterator[Any]:
        if self._scheduler is None:
            self._num_workers = joblib.cpu_count()
            options: dict[str, Any] = {'backend': BACKEND, 'n_jobs': max(2, self._num_workers)}
        else:
            options = _connect(self._scheduler)
            self._num_workers = options['n_jobs']
        backend = {name: value for name, value in options.items() if name != 'n_jobs'}
        with joblib.parallel_config(**backend):
            parallel = joblib.Parallel(
                n_jobs=options['n_jobs'],
                return_as='generator_unordered',
                batch_size=1,
                pre_dispatch='n_jobs',
                **({'max_nbytes': None} if self._scheduler is None else {}),
            )
            return parallel(self._generate())

    def _generate(self) -> Iterator[Any]:
        """Yields calls. joblib fetches them from its threads, one at a time."""
        main_pid = os.getpid() if self._scheduler is None else None
        while True:
            call = self._choose()
            if call is not None:
                yield joblib.delayed(_run)(*call, main_pid, self._with_pages)
            elif not (self.is_reading or self._running or self._pages or self._get_num_waiting()):
                return
            else:
                yield joblib.delayed(_run)(None, joblib.delayed(tasks.idle)(), main_pid, self._with_pages)

    def _choose(self) -> tuple[int, Any] | None:
        num_reading = sum(task.unit is not None for task in list(self._running.values()))
        unit = None
        if self._is_careful or self._suspects:
            if self._running:
                return None
            if self._suspects:
                unit = self._suspects.popleft()
        elif self._pages:
            call = self._pages.popleft()
            return self._add(None, call)
        elif self._units and num_reading + self._get_num_waiting() < MAX_AHEAD * self._num_workers:
            unit = self._units.popleft()
        return None if unit is None else self._add(unit, self._create_call(unit))

    def _add(self, unit: Unit | None, call: Any) -> tuple[int, Any]:
        number = next(self._numbers)
        self._running[number] = Task(number, unit, call, time.monotonic())
        return number, call

    def _check_time(self) -> None:
        """Raises _Stuck for a reader that its own time limit could not stop."""
        limit = 2 * tasks.READ_SECONDS + 60
        if self._scheduler is None and any(
            task.unit is not None and time.monotonic() - task.started > limit for task in list(self._running.values())
        ):
            raise _Stuck

    def _handle_crash(self, error: BaseException) -> Iterator[tuple[Task, Any]]:
        """Puts back what ran when a worker died. A unit that ran alone is the cause, and is refused."""
        running, self._running = list(self._running.values()), {}
        was_alone = len(running) == 1
        self._num_crashes += 1
        if self._num_crashes > MAX_CRASHES:
            raise UserError(WORKER_KILLED) from error
        for task in running:
            if task.unit is None:
                self._pages.appendleft(task.call)
            elif was_alone:
                reason = f'a worker died while it read this ({type(error).__name__}): damaged files, or want of memory'
                refusal = tasks.Refusal(task.unit.name, '', reason)
                yield task, tasks.UnitResult([], [refusal], 0)
            else:
                self._suspects.append(task.unit)
        self._is_careful = bool(self._suspects)
        again = 'what it read is left out' if was_alone else f'{len(running)} tasks are repeated, one at a time'
        log.warning('a worker died (%s): %s', type(error).__name__, again)

    def _stop(self, results: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # joblib warns of the tasks that this cancels
            results.close()
        if self._scheduler is None and (self._running or self._is_careful):
            loky.get_reusable_executor().shutdown(wait=True, kill_workers=True)


def _run(number: int | None, call: Any, main_pid: int | None, with_pages: bool) -> tuple[int | None, Any]:
    if main_pid is not None:
        tasks.prepare_worker(main_pid, with_pages=with_pages)
    function, arguments, options = call
    return number, function(*arguments, **options)


def _connect(scheduler: str) -> dict[str, Any]:
    """Returns the options of joblib for a Dask cluster."""
    try:
        import distributed
    except ImportError as error:
        raise UserError("--scheduler needs Dask: pip install 'covidjax[cluster]'") from error
    try:
        client = distributed.Client(scheduler, timeout=30, set_as_default=True)
        threads = sum(client.nthreads().values())
    except (OSError, TimeoutError, ValueError) as error:
        raise UserError(f'--scheduler={scheduler}: no Dask scheduler answers there ({type(error).__name__})') from error
    if not threads:
        raise UserError(f'--scheduler={scheduler} has no workers: start some with `dask worker {scheduler}`')
    return {'backend': 'dask', 'client': client, 'n_jobs': threads}
