"""What workers do for an archive: read and prepare a unit, write a page, or, on a cluster, predict a unit."""

import contextlib
import functools
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from covidjax.data.preprocess import set_up_worker
from covidjax.data.scan.dicom import read_headers
from covidjax.data.scan.volume import Found, find_scans
from covidjax.errors import UserError
from covidjax.predict.prepare import PreparedScan, Recipe, prepare_scan, stack_images
from covidjax.predict.tables import get_id
from covidjax.predict.units import Unit, open_unit

if TYPE_CHECKING:
    from covidjax.report.prediction import Prediction

READ_SECONDS = 900  # for a unit; a file server that takes longer hangs
IDLE_SECONDS = 0.02
MAX_COPIES = 0.1  # share of the slices of a joined unit

Known = frozenset[tuple[str, str]]  # (path, id) of scans that have a row
Maker = dict[str, str] | None


class Refusal(NamedTuple):
    """A scan, or a whole unit, that could not be predicted.

    Attributes:
      path, series, reason: for the table of failures.
      id: of the scan, '' for a whole unit.
      dicom: DICOM files by name, see `dicom_results`; none without --dicom, or if nothing can refer to the slices.
    """

    path: str
    series: str
    reason: str
    id: str = ''
    dicom: dict[str, bytes] | None = None


class Prepared(NamedTuple):
    """A scan that is ready for the model.

    Attributes:
      path, series: for its row.
      scan: the scan.
      seconds: of reading and preparing.
      headers: of its slices, for DICOM results; empty if there are none.
    """

    path: str
    series: str
    scan: PreparedScan
    seconds: dict[str, float]
    headers: list[Any]


class Finished(NamedTuple):
    """A predicted scan.

    Attributes:
      path, series: for its row.
      summary: prediction.json.
      page: prediction.html; None without a page.
      dicom: DICOM files by name, see `dicom_results`; none without --dicom, or if nothing can refer to the slices.
    """

    path: str
    series: str
    summary: dict[str, Any]
    page: str | None
    dicom: dict[str, bytes]


class UnitResult(NamedTuple):
    """What became of a unit.

    Attributes:
      scans: `Prepared`, or `Finished` on a cluster.
      refusals: what could not be read.
      num_known: scans that have a row already.
    """

    scans: list[Any]
    refusals: list[Refusal]
    num_known: int


@functools.cache  # once in a process
def prepare_worker(main_pid: int, *, with_pages: bool) -> None:
    """Prepares a worker of this host, before its first task.

    Args:
      main_pid: see `prepare_unit`.
      with_pages: the worker will write pages.
    """
    set_up_worker(main_pid)
    if with_pages:
        import covidjax.report.prediction  # noqa: F401


def idle() -> None:
    """Waits a moment. A worker gets this while it must not run ahead of the model."""
    time.sleep(IDLE_SECONDS)


def prepare_unit(
    unit: Unit, recipe: Recipe, known: Known, *, force: bool, maker: Maker, main_pid: int | None
) -> UnitResult:
    """Reads and prepares the scans of a unit.

    Args:
      unit: what to read.
      recipe: how to prepare it.
      known: scans that have a row.
      force: see `prepare_scan`.
      maker: see `dicom_results.describe_maker`; None: no DICOM results.
      main_pid: process that waits for the result; the worker exits when it ends. None on a cluster.
    """
    if main_pid is not None:
        set_up_worker(main_pid)
    return _limit(functools.partial(_prepare_unit, unit, recipe, known, force, maker), unit, READ_SECONDS)


def predict_unit(
    unit: Unit, workdir: str | None, known: Known, *, force: bool, pages: str, windows: int, maker: Maker
) -> UnitResult:
    """Reads, prepares and predicts the scans of a unit with the run of `workdir`, which each process loads once."""
    result = prepare_unit(unit, _load_recipe(workdir, windows), known, force=force, maker=maker, main_pid=None)
    from covidjax.experiment.runs import compute_member_outputs
    from covidjax.predict.scan import conclude

    run = _load_run(workdir)
    finished = []
    for one in result.scans:
        start = time.perf_counter()
        outputs = compute_member_outputs(run, stack_images(one.scan))
        prediction = conclude(run, one.scan, outputs)
        seconds = one.seconds | {'model': time.perf_counter() - start}
        finished.append(finish_scan(one._replace(seconds=seconds), prediction, run.results, pages, maker))
    return result._replace(scans=finished)


_loading = threading.Lock()  # a worker of a cluster may have several threads


def _load_run(workdir: str | None) -> Any:
    with _loading:
        return _load_run_once(workdir)


@functools.cache
def _load_run_once(workdir: str | None) -> Any:
    from covidjax.experiment.runs import load_run

    return load_run(workdir and Path(workdir))


def _load_recipe(workdir: str | None, windows: int) -> Recipe:
    from covidjax.predict.scan import create_recipe

    return create_recipe(_load_run(workdir), windows)


def has_page(summary: dict[str, Any], pages: str) -> bool:
    """Returns whether a scan gets a page: with 'positive' unless it is normal, or without a verdict, not infected."""
    is_positive = summary['verdict'] != 'normal' if 'verdict' in summary else summary['lesions']['num_infected'] > 0
    return pages == 'all' or (pages == 'positive' and is_positive)


def finish_scan(
    prepared: Prepared, prediction: 'Prediction', results: dict[str, Any], pages: str, maker: Maker
) -> Finished:
    """Renders the page of a scan, if it gets one, and its DICOM results.

    Args:
      prepared: the scan; its images are not needed.
      prediction: its prediction.
      results: results.json of the run.
      pages: 'all', 'positive' or 'none'.
      maker: see `dicom_results.describe_maker`; None: no DICOM results.
    """
    seconds, page, dicom = dict(prepared.seconds), None, {}
    summary = prediction.summary | {'seconds': {stage: round(s, 2) for stage, s in seconds.items()}}
    if has_page(summary, pages):
        from covidjax.report.prediction import write_page  # it takes seconds to import

        start = time.perf_counter()
        with TemporaryDirectory() as folder:
            path = Path(folder, 'prediction.html')
            write_page(path, prepared.scan.volume, prediction._replace(summary=summary), results)
            page = path.read_text()
        seconds['report'] = time.perf_counter() - start
        summary['seconds'] = {stage: round(s, 2) for stage, s in seconds.items()}
    if maker is not None and prepared.headers:
        from covidjax.predict import dicom_results

        with contextlib.suppress(UserError):
            dicom = dicom_results.create_results(prepared.headers, prepared.scan.volume, prediction, results, maker)
    return Finished(prepared.path, prepared.series, summary, page, dicom)


def _limit(work: Callable[[], UnitResult], unit: Unit, seconds: float) -> UnitResult:
    """Returns the result of `work`, or a refusal after some time: a thread that waits for a file can't be stopped."""
    results: list[UnitResult] = []
    thread = threading.Thread(target=lambda: results.append(work()), daemon=True)
    thread.start()
    thread.join(seconds)
    if results:
        return results[0]
    reason = f'not read within {seconds:.0f} s: does the file server hang?' if thread.is_alive() else 'unexpected error'
    return UnitResult([], [Refusal(unit.name, '', reason)], 0)


def _prepare_unit(unit: Unit, recipe: Recipe, known: Known, force: bool, maker: Maker) -> UnitResult:
    result = UnitResult([], [], 0)
    try:
        with open_unit(unit) as groups:
            if len(groups) > 1:
                together = [entry for _, entries in groups for entry in entries]
                groups = [(unit.name, together)] if not _holds_copies(together, recipe) else groups
            for name, entries in groups:
                result = _prepare_group(name, entries, recipe, known, force, maker, result)
    except UserError as error:
        result.refusals.append(Refusal(unit.name, '', _shorten(error, unit)))
    except Exception as error:  # one scan must not end the archive
        result.refusals.append(Refusal(unit.name, '', describe_error(error)))
    return result


def _holds_copies(entries: list[Any], recipe: Recipe) -> bool:
    """Returns whether folders that name one series hold it more than once."""
    scans = find_scans(entries, '', with_lungs=False)
    return not scans or max(scan.share_copies for scan in scans) > MAX_COPIES


def _prepare_group(
    name: str, entries: list[Any], recipe: Recipe, known: Known, force: bool, maker: Maker, result: UnitResult
) -> UnitResult:
    start = time.perf_counter()
    scans = find_scans(entries, Path(name).name, with_lungs=recipe.with_lungs, hu_step=recipe.hu_step)
    finding = time.perf_counter() - start
    num_known = result.num_known
    for scan in scans:
        if (name, get_id(scan.sha256)) in known:
            num_known += 1
            continue
        try:
            start = time.perf_counter()
            volume = scan.read()
            seconds = {'reading': time.perf_counter() - start + finding / len(scans)}
            start = time.perf_counter()
            prepared = prepare_scan(volume, recipe, force=force)
            seconds['preparing'] = time.perf_counter() - start
        except Exception as error:
            reason = str(error) if isinstance(error, UserError) else describe_error(error)
            dicom = _report_refusal(scan, reason, maker)
            result.refusals.append(Refusal(name, scan.series, reason, get_id(scan.sha256), dicom))
        else:
            headers = [] if maker is None else read_headers(scan.frames)
            result.scans.append(Prepared(name, scan.series, prepared, seconds, headers))
    return result._replace(num_known=num_known)


def _report_refusal(scan: Found, reason: str, maker: Maker) -> dict[str, bytes]:
    if maker is None or not scan.frames:
        return {}
    from covidjax.predict import dicom_results

    try:
        return dicom_results.create_refusal(read_headers(scan.frames), reason, maker)
    except UserError:
        return {}


def _shorten(error: UserError, unit: Unit) -> str:
    return str(error).removeprefix(f'{unit.path}: ')


def describe_error(error: Exception) -> str:
    """Returns where an unexpected error arose. Its message may quote a header, and is left out."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f'unexpected {type(error).__name__} in {Path(place.filename).name}, line {place.lineno}'
