"""Reads and prepares scans in a process of its own, while the first one loads jax and the model.

Both take seconds, mostly in Python, which runs on one core of a process. The reader is one scan ahead of the model.
This module imports little, so that the reader can start before the imports of the model.
"""

import functools
import json
import multiprocessing
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import covidjax
from covidjax.errors import UserError

if TYPE_CHECKING:
    from covidjax.data.scan.volume import Volume
    from covidjax.predict.prepare import PreparedScan, Recipe


class Read(NamedTuple):
    """A scan that was read.

    Attributes:
      volume: the scan; if it is prepared and no masks are wanted, of its slices only the middle one.
      prepared: ready for the model; the reason if it is refused; None if a model must find its lungs first.
      seconds: of 'reading' and 'preparing'.
    """

    volume: 'Volume'
    prepared: 'PreparedScan | UserError | None'
    seconds: dict[str, float]


class Reader:
    """A process that reads the inputs of `predict`, in order.

    Args:
      workdir: of the run, see `runs.load_run`.
      inputs, series, force, masks: see `scan.predict_all`.
      windows: see `scan.create_recipe`.
    """

    def __init__(
        self,
        workdir: Path | None,
        inputs: Sequence[Path],
        *,
        series: str | None,
        force: bool,
        masks: bool,
        windows: int,
    ):
        context = multiprocessing.get_context('spawn')
        self._connection, other = context.Pipe()
        arguments = (other, multiprocessing.current_process().pid, workdir, windows, list(inputs))
        process = context.Process(target=_serve, args=(*arguments, series, force, masks), daemon=True)
        process.start()
        other.close()  # so that the end of the process is the end of the connection

    def get(self, recipe: 'Recipe') -> Read | None:
        """Returns the next input, or None if the reader failed or followed another recipe: read it here then.

        Raises:
          UserError: the scan is refused.
        """
        try:
            followed, result = self._connection.recv()
        except (EOFError, OSError):
            return None
        if followed != recipe:
            return None
        if isinstance(result, UserError):
            raise result
        return result


def _serve(
    connection: Connection,
    main_pid: int,
    workdir: Path | None,
    windows: int,
    inputs: Sequence[Path],
    series: str | None,
    force: bool,
    masks: bool,
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the first process, whose end ends this one
    from covidjax.data.preprocess import exit_with_parent

    exit_with_parent(main_pid)
    try:
        recipe = plan_run(workdir, windows)
        for path in inputs:
            try:
                result = read_scan(path, series, recipe, force=force, with_slices=masks)
            except UserError as error:
                result = error
            connection.send((recipe, result))
    except Exception:  # the first process reads the scan itself and tells what is wrong
        connection.close()


def read_scan(path: Path, series: str | None, recipe: 'Recipe', *, force: bool, with_slices: bool) -> Read:
    """Reads a scan, and prepares it if this needs no model.

    Args:
      path, series: see `volume.read_volume`.
      recipe: how to prepare it.
      force: goes on in spite of doubts.
      with_slices: keeps all slices of the volume.

    Raises:
      UserError: there is no scan.
    """
    from covidjax.data.scan.volume import read_volume

    start = time.perf_counter()
    volume = read_volume(path, series, with_lungs=recipe.with_lungs, hu_step=recipe.hu_step)
    seconds = {'reading': time.perf_counter() - start}
    if recipe.region == 'lungs' and volume.lungs is None:
        return Read(volume, None, seconds)
    try:
        prepared = prepare(volume, path, recipe, seconds, force=force)
    except UserError as error:
        return Read(volume._replace(slices=[], planes_hu=None), error, seconds)
    return Read(volume if with_slices else prepared.volume, prepared, seconds)


def prepare(
    volume: 'Volume', path: Path, recipe: 'Recipe', seconds: dict[str, float], *, force: bool
) -> 'PreparedScan':
    """Returns `prepare_scan` of the scan at a path; `seconds` gets 'preparing'.

    Raises:
      UserError: the scan is refused.
    """
    from covidjax.predict.prepare import prepare_scan

    start = time.perf_counter()
    try:
        prepared = prepare_scan(volume, recipe, force=force)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    seconds['preparing'] = time.perf_counter() - start
    return prepared


def plan_run(workdir: Path | None, windows: int) -> 'Recipe':
    """Returns what `scan.create_recipe` will return for a run, from its config alone.

    Args:
      workdir: of the run, see `runs.load_run`.
      windows: see `scan.create_recipe`.

    Raises:
      Exception: the config or the lesion model can't be read.
    """
    from covidjax.predict.prepare import plan_recipe

    config = None if workdir is None else _read_config(workdir)
    if config is None or config['name'] == 'lesions':
        size = _find_outline_size('box' if workdir is None else str(workdir))
        return plan_recipe({'image_size': size}, is_scan_run=False, outline_size=size, windows=1)
    outline_size = _find_outline_size(config['lesions']) if config.get('lesions') else 0
    is_scan_run = 'extractor' in config
    return plan_recipe(config['data'], is_scan_run=is_scan_run, outline_size=outline_size, windows=windows)


def _read_config(workdir: Path) -> dict[str, Any]:
    return json.loads((workdir / 'config.json').read_text())


@functools.cache
def _find_outline_size(name: str) -> int:
    """Returns the side of the slices of a lesion model; for the name see `lesions.load_lesions`."""
    path = Path(covidjax.__file__).parent / 'weights' / 'lesions.safetensors' if name == 'box' else Path(name)
    if path.suffix != '.safetensors':
        return _read_config(path.expanduser())['data']['image_size']
    import safetensors

    with safetensors.safe_open(path.expanduser(), 'numpy') as file:
        return json.loads(file.metadata()['image_size'])
