"""Checkpoints of a run: the latest state to resume from, and the best model to test.

Both are stored under `<workdir>/checkpoints`. orbax renames a finished checkpoint into place; the digests of its files
are written after that. A checkpoint without digests is incomplete and counts as absent. orbax restores corrupted files
without an error, so digests are verified before every restore.

The name of a checkpoint is the number of updates plus the number of validations before it. It grows with every save,
also when a run stops between the last update of an epoch and its validation.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from covidjax.errors import UserError, compare_shapes, join_faults
from covidjax.training.digests import find_damage, is_finished, write_digests
from covidjax.training.hosts import is_first
from covidjax.training.state import TrainState

log = logging.getLogger(__name__)


class Checkpoints:
    """The latest and the best checkpoints of one workdir.

    Each kind has its own manager: one manager that keeps the best would drop the latest when the loss worsens.
    """

    def __init__(self, workdir: Path):
        folder = Path(workdir).absolute() / 'checkpoints'
        # Two, so that one is left if the newer one is damaged.
        self._latest = self._open(
            folder / 'latest', keep=2, state=ocp.StandardCheckpointHandler(), progress=ocp.JsonCheckpointHandler()
        )
        # Three: falling back by one state drops up to two that were saved after it.
        self._best = self._open(folder / 'best', keep=3, variables=ocp.StandardCheckpointHandler())

    @staticmethod
    def _open(folder: Path, keep: int, **item_handlers: ocp.CheckpointHandler) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        return ocp.CheckpointManager(folder, options=options, item_handlers=item_handlers)

    def save_latest(self, number: int, state: TrainState, progress: dict[str, Any]) -> None:
        """Saves the whole state and the run's JSON-serialisable `progress` as checkpoint `number`."""
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        _save(self._latest, number, arguments)

    def save_best(self, number: int, state: TrainState) -> None:
        """Saves the model's variables as the best so far, as checkpoint `number`."""
        _save(self._best, number, ocp.args.Composite(variables=ocp.args.StandardSave(state.variables)))

    def restore_latest(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the latest sound state and its progress, or None if there is no checkpoint yet.

        A state is sound if its own files and those of the best model at that time are undamaged. Later checkpoints are
        deleted; the resumed run writes them again.

        Args:
          template: shapes, dtypes and shardings of the state.

        Raises:
          UserError: all finished checkpoints are damaged; every fault is listed.
        """
        damage = []
        for number in sorted(self._latest.all_steps(), reverse=True):
            folders = [_get_folder(self._latest, number)]
            folders += [_get_folder(self._best, best) for best in _list_finished(self._best) if best <= number][-1:]
            faults = [f'{folder}: {fault}' for folder in folders for fault in find_damage(folder)]
            if not faults:
                self._drop_after(number)
                arguments = ocp.args.Composite(
                    state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore()
                )
                restored = self._latest.restore(number, args=arguments)
                return restored['state'], restored['progress']
            log.warning('checkpoint %d is unusable, trying the previous one: %s', number, join_faults(faults))
            if is_finished(folders[0]):
                damage += faults
        if damage:
            raise UserError(
                f'all checkpoints are damaged ({join_faults(damage)}): put copies of these files back, or delete '
                f'{self._latest.directory.parent} to start again'
            )
        self._drop_after(-1)
        return None

    def _drop_after(self, number: int) -> None:
        for manager in (self._latest, self._best):
            for later in [other for other in manager.all_steps() if other > number]:
                manager.delete(later)

    def restore_best(self, template: dict[str, Any]) -> dict[str, Any]:
        """Returns the variables of the best epoch.

        Args:
          template: shapes, dtypes and shardings of the model's variables.

        Raises:
          UserError: there is none yet, its files are damaged, or its names or shapes differ from the template. All
            faults or differences are listed.
        """
        finished = _list_finished(self._best)
        if not finished:
            raise UserError(f'{self._best.directory} has no checkpoint yet: train first')
        folder = _get_folder(self._best, finished[-1])
        faults = find_damage(folder)
        if faults:
            raise UserError(
                f'{folder} is damaged ({join_faults(faults)}): put a copy back, or train in another --workdir'
            )
        differences = compare_shapes(
            _list_shapes(self._best.item_metadata(finished[-1])['variables'].tree), _list_shapes(template)
        )
        if differences:
            raise UserError(
                f'the checkpoint in {self._best.directory} holds another model ({join_faults(differences)}): train in '
                'another --workdir'
            )
        arguments = ocp.args.Composite(variables=ocp.args.StandardRestore(template))
        return self._best.restore(finished[-1], args=arguments)['variables']

    def close(self) -> None:
        """Waits for pending writes and releases the folders."""
        self._latest.close()
        self._best.close()


def _get_folder(manager: ocp.CheckpointManager, number: int) -> Path:
    return Path(manager.directory) / str(number)


def _list_finished(manager: ocp.CheckpointManager) -> list[int]:
    return sorted(number for number in manager.all_steps() if is_finished(_get_folder(manager, number)))


def _save(manager: ocp.CheckpointManager, number: int, arguments: ocp.args.Composite) -> None:
    with _quiet_writers():
        manager.save(number, args=arguments)
    if is_first():
        write_digests(_get_folder(manager, number))


@contextlib.contextmanager
def _quiet_writers() -> Iterator[None]:
    """Keeps orbax's threads from printing the traceback of an error that `save` raises anyway."""
    logger = logging.getLogger('absl')
    before = threading.excepthook, logger.disabled
    threading.excepthook, logger.disabled = lambda _: None, True
    try:
        yield
    finally:
        threading.excepthook, logger.disabled = before


def _list_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, 'shape'))
    return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape) for path, leaf in leaves}


def has_checkpoint(workdir: Path) -> bool:
    """Returns whether a run has a finished checkpoint of its state, sound or damaged."""
    return any(is_finished(folder) for folder in (Path(workdir) / 'checkpoints' / 'latest').glob('*'))


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a workdir; closes them on exit."""
    checkpoints = Checkpoints(workdir)
    try:
        yield checkpoints
    finally:
        checkpoints.close()
