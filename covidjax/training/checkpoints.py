"""Checkpoints of a run: the latest state to go on from, and the best model to test.

Both lie under `<workdir>/checkpoints`. orbax renames a finished checkpoint into place, so that one is whole or absent.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from covidjax.errors import UserError, compare_shapes, join_faults
from covidjax.training.state import TrainState


class Checkpoints:
    """The two kinds of checkpoints of one workdir.

    They have a manager each, since a manager that keeps the best drops the latest when the loss worsens.
    """

    def __init__(self, workdir: Path):
        folder = Path(workdir).absolute() / 'checkpoints'
        self._latest = self._open(
            folder / 'latest', keep=1, state=ocp.StandardCheckpointHandler(), progress=ocp.JsonCheckpointHandler()
        )
        # Two, so that one is left when the newer is dropped on resuming from a state before it.
        self._best = self._open(folder / 'best', keep=2, variables=ocp.StandardCheckpointHandler())

    @staticmethod
    def _open(folder: Path, keep: int, **item_handlers: ocp.CheckpointHandler) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        return ocp.CheckpointManager(folder, options=options, item_handlers=item_handlers)

    def save_latest(self, state: TrainState, progress: dict[str, Any]) -> None:
        """Saves a whole state and the JSON-able `progress` of the run beside it."""
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress))
        self._latest.save(int(state.step), args=arguments)

    def save_best(self, state: TrainState) -> None:
        """Saves the model's variables of the best epoch so far."""
        self._best.save(int(state.step), args=ocp.args.Composite(variables=ocp.args.StandardSave(state.variables)))

    def restore_latest(self, template: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """Returns the latest state and its progress, or None before the first; `template` gives shapes and shardings.

        Best models saved after that state are dropped: the run is going to find them again.
        """
        step = self._latest.latest_step()
        if step is None:
            self._drop_best_after(-1)
            return None
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(template), progress=ocp.args.JsonRestore())
        restored = self._latest.restore(step, args=arguments)
        self._drop_best_after(step)
        return restored['state'], restored['progress']

    def _drop_best_after(self, step: int) -> None:
        for later in [s for s in self._best.all_steps() if s > step]:
            self._best.delete(later)

    def restore_best(self, template: dict[str, Any]) -> dict[str, Any]:
        """Returns the variables of the best epoch.

        Args:
          template: shapes, dtypes and shardings of the model's variables.

        Raises:
          UserError: there is none yet; or its names or shapes are not the template's, all differences being listed.
        """
        step = self._best.latest_step()
        if step is None:
            raise UserError(f'{self._best.directory} has no checkpoint yet: train first')
        differences = compare_shapes(
            _list_shapes(self._best.item_metadata(step)['variables'].tree), _list_shapes(template)
        )
        if differences:
            raise UserError(f'the checkpoint in {self._best.directory} is of another model: {join_faults(differences)}')
        arguments = ocp.args.Composite(variables=ocp.args.StandardRestore(template))
        return self._best.restore(step, args=arguments)['variables']

    def close(self) -> None:
        """Waits for writes and lets go of the folders."""
        self._latest.close()
        self._best.close()


def _list_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: hasattr(node, 'shape'))
    return {jax.tree_util.keystr(path, simple=True, separator='/'): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def open_checkpoints(workdir: Path) -> Iterator[Checkpoints]:
    """Opens the checkpoints of a workdir and closes them at the end."""
    checkpoints = Checkpoints(workdir)
    try:
        yield checkpoints
    finally:
        checkpoints.close()
