"""Epochs of training with validation, early stopping and checkpoints, for any model and step."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import tensorboardX
from tqdm import tqdm

from covidjax.errors import UserError
from covidjax.files import replace_file
from covidjax.training.checkpoints import Checkpoints
from covidjax.training.state import TrainState

log = logging.getLogger(__name__)

LOG_EVERY_STEPS = 10


class Schedule(NamedTuple):
    """When to validate and when to stop.

    Attributes:
      steps_per_epoch: updates between two validations.
      num_epochs: at most.
      patience: epochs without a better validation loss before stopping.
      min_delta: by how much a loss must fall below the best to be better.
      examples_per_step: for the rates that are shown.
    """

    steps_per_epoch: int
    num_epochs: int
    patience: int
    min_delta: float
    examples_per_step: int


def find_best_epoch(val_losses: Sequence[float], min_delta: float) -> int:
    """Returns the number (from 1) of the last epoch whose loss was `min_delta` below the best before; 0 if none."""
    best_epoch, best = 0, math.inf
    for epoch, loss in enumerate(val_losses, start=1):
        if loss < best - min_delta:
            best_epoch, best = epoch, loss
    return best_epoch


def fit(
    template: TrainState,
    create_state: Callable[[], TrainState],
    step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    validate: Callable[[dict], tuple[float, float]],
    load_batches: Callable[[int], Iterator[dict]],
    *,
    schedule: Schedule,
    checkpoints: Checkpoints,
    workdir: Path,
) -> list[dict]:
    """Trains until the last epoch or until patience ends, going on from the latest checkpoint if there is one.

    Args:
      template: shapes and shardings of the state.
      create_state: makes the initial state; called in a new run only.
      step: compiled `train_step`.
      validate: variables -> (mean weighted loss, accuracy) of the validation split.
      load_batches: number of the first step -> batches from there on, placed on the devices.
      schedule: when to validate and stop.
      checkpoints: the latest state is saved after every epoch, the model of the best epoch beside it.
      workdir: gets metrics.jsonl (a line per epoch) and tensorboard/.

    Returns:
      Per epoch a dict: epoch, step, train_loss, train_accuracy, val_loss, val_accuracy, seconds, examples_per_second.

    Raises:
      UserError: the loss is not finite.
    """
    restored = checkpoints.restore_latest(template)
    if restored is None:
        state, history = create_state(), []
    else:
        state, history = restored[0], restored[1]['history']
        log.info('going on after epoch %d of at most %d', len(history), schedule.num_epochs)
    writer = tensorboardX.SummaryWriter(str(workdir / 'tensorboard'), purge_step=int(state.step) + 1)
    batches = None
    try:
        while not is_finished(history, schedule):
            if batches is None:
                batches = load_batches(int(state.step))
            state, entry = _train_epoch(state, step, batches, len(history) + 1, schedule, writer)
            start = time.perf_counter()
            entry['val_loss'], entry['val_accuracy'] = validate(state.variables)
            entry['val_seconds'] = round(time.perf_counter() - start, 3)
            if not (math.isfinite(entry['train_loss']) and math.isfinite(entry['val_loss'])):
                raise UserError(
                    f'the loss is not finite in epoch {entry["epoch"]} (train {entry["train_loss"]}, validation '
                    f'{entry["val_loss"]}): lower --config.train.learning_rate; earlier checkpoints are kept'
                )
            history.append(entry)
            is_best = find_best_epoch([e['val_loss'] for e in history], schedule.min_delta) == entry['epoch']
            # The best first: killed in between, the run repeats this epoch and finds the same best again.
            if is_best:
                checkpoints.save_best(state)
            checkpoints.save_latest(state, {'history': history})
            write_history(workdir, history)
            for name in ('train_loss', 'train_accuracy', 'val_loss', 'val_accuracy'):
                writer.add_scalar(f'epoch/{name}', entry[name], entry['step'])
            log.info(
                'epoch %d: train loss %.4f accuracy %.3f, validation loss %.4f accuracy %.3f%s (%.0f examples/s)',
                entry['epoch'],
                entry['train_loss'],
                entry['train_accuracy'],
                entry['val_loss'],
                entry['val_accuracy'],
                ', best so far' if is_best else '',
                entry['examples_per_second'],
            )
    finally:
        writer.close()
    write_history(workdir, history)
    return history


def is_finished(history: Sequence[dict], schedule: Schedule) -> bool:
    """Says whether all epochs are done or patience has ended."""
    best = find_best_epoch([entry['val_loss'] for entry in history], schedule.min_delta)
    return len(history) >= schedule.num_epochs or len(history) - best >= schedule.patience


def _train_epoch(
    state: TrainState,
    step: Callable[[TrainState, dict], tuple[TrainState, dict]],
    batches: Iterator[dict],
    epoch: int,
    schedule: Schedule,
    writer: tensorboardX.SummaryWriter,
) -> tuple[TrainState, dict]:
    start = time.perf_counter()
    first_step = int(state.step)
    totals = previous = None
    with tqdm(total=schedule.steps_per_epoch, desc=f'epoch {epoch}/{schedule.num_epochs}', unit='step') as progress:
        for i in range(schedule.steps_per_epoch):
            state, sums = step(state, next(batches))
            totals = sums if totals is None else jax.tree.map(jax.numpy.add, totals, sums)
            # The device works on this step while the one before is read.
            if previous is not None and i % LOG_EVERY_STEPS == 0:
                loss = float(previous['loss'] / previous['weight'])
                rate = i * schedule.examples_per_step / (time.perf_counter() - start)
                progress.set_postfix_str(f'loss {loss:.3f}, {rate:.0f} examples/s', refresh=False)
                writer.add_scalar('step/train_loss', loss, first_step + i)
            previous = sums
            progress.update()
        totals = jax.device_get(totals)
    seconds = time.perf_counter() - start
    return state, {
        'epoch': epoch,
        'step': first_step + schedule.steps_per_epoch,
        'train_loss': float(totals['loss'] / totals['weight']),
        'train_accuracy': float(totals['correct'] / totals['count']),
        'seconds': round(seconds, 3),
        'examples_per_second': round(schedule.steps_per_epoch * schedule.examples_per_step / seconds, 1),
    }


def write_history(workdir: Path, history: Sequence[dict]) -> None:
    """Writes metrics.jsonl anew, a line per epoch, so that a resumed run neither loses nor doubles one."""
    with replace_file(workdir / 'metrics.jsonl') as temporary:
        temporary.write_text(''.join(json.dumps(entry) + '\n' for entry in history))


def read_history(workdir: Path) -> list[dict]:
    """Returns what `write_history` wrote.

    Raises:
      UserError: the run has not finished its first epoch.
    """
    try:
        return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    except FileNotFoundError as error:
        raise UserError(f'{workdir} has no finished epoch yet: train first') from error
