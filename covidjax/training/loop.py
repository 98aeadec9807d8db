"""The training loop: epochs, validation, early stopping and checkpoints, for any model and step."""

import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from covidjax.errors import UserError
from covidjax.files import replace_file
from covidjax.progress import open_progress
from covidjax.training.checkpoints import Checkpoints
from covidjax.training.hosts import is_first
from covidjax.training.interrupts import Stopped, StopSignals, hold_stop_signals
from covidjax.training.state import TrainState
from covidjax.training.tensorboard import open_curves

log = logging.getLogger(__name__)

LOG_EVERY_STEPS = 10


class Schedule(NamedTuple):
    """When to validate, save and stop.

    Attributes:
      steps_per_epoch: updates between two validations.
      num_epochs: maximum number of epochs.
      patience: epochs without a better validation loss before stopping.
      min_delta: smallest decrease of the validation loss that counts as an improvement.
      checkpoint_steps: updates between two checkpoints within an epoch; 0 saves only at the end of each epoch.
      examples_per_step: batch size, for the throughput in the log.
    """

    steps_per_epoch: int
    num_epochs: int
    patience: int
    min_delta: float
    checkpoint_steps: int
    examples_per_step: int


class Task(NamedTuple):
    """What to train.

    Attributes:
      template: shapes and shardings of the state.
      create_state: makes the initial state; called in a new run only.
      step: compiled `train_step`.
      validate: variables -> (mean weighted loss, mean score) of the validation split.
      load_batches: state -> the batches that follow it, placed on the devices.
      describe_step: step number -> its learning rate and examples, for the message about a non-finite loss.
      score: name of the score.
    """

    template: TrainState
    create_state: Callable[[], TrainState]
    step: Callable[[TrainState, dict], tuple[TrainState, dict]]
    validate: Callable[[dict], tuple[float, float]]
    load_batches: Callable[[TrainState], Iterator[dict]]
    describe_step: Callable[[int], str]
    score: str = 'accuracy'


class Epoch(NamedTuple):
    """Running totals of an unfinished epoch: sums over its steps (see `train_step`) and their seconds.

    Sums are added in double precision in the order of the steps, so that a resumed run gets the same totals.
    """

    loss: float = 0.0
    weight: float = 0.0
    correct: float = 0.0
    count: float = 0.0
    seconds: float = 0.0

    def add(self, sums: dict[str, float]) -> 'Epoch':
        """Returns the totals with one more step."""
        added = {name: getattr(self, name) + float(sums[name]) for name in ('loss', 'weight', 'correct', 'count')}
        return self._replace(**added)


def find_best_epoch(val_losses: Sequence[float], min_delta: float) -> int:
    """Returns the last epoch (from 1) with a loss more than `min_delta` below the previous best; 0 if none."""
    best_epoch, best = 0, math.inf
    for epoch, loss in enumerate(val_losses, start=1):
        if loss < best - min_delta:
            best_epoch, best = epoch, loss
    return best_epoch


def fit(task: Task, schedule: Schedule, checkpoints: Checkpoints, workdir: Path) -> list[dict]:
    """Trains until the last epoch or early stopping; resumes from the latest checkpoint if there is one.

    A checkpoint holds everything that the rest of the run depends on: the state with its root key, the history (for
    early stopping) and the totals of an unfinished epoch. The number of updates is also the position in the data.

    Args:
      task: what to train.
      schedule: when to validate, save and stop.
      checkpoints: get the latest state after every epoch, and the model of the best epoch.
      workdir: gets metrics.jsonl (one line per epoch) and tensorboard/.

    Returns:
      One dict per epoch: epoch, step, train_loss, train_<score>, val_loss, val_<score>, seconds, examples_per_second,
      val_seconds.

    Raises:
      UserError: a loss or gradient is not finite.
      Stopped: SIGTERM or Ctrl-C; the state is saved.
    """
    restored = checkpoints.restore_latest(task.template)
    if restored is None:
        state, history, epoch = task.create_state(), [], Epoch()
    else:
        state, history, epoch = restored[0], restored[1]['history'], Epoch(**restored[1]['epoch'])
        log.info('going on after epoch %d of at most %d, step %d', len(history), schedule.num_epochs, int(state.step))
        write_history(workdir, history)
    if is_finished(history, schedule):
        return history

    def save(state: TrainState, epoch: Epoch) -> None:
        progress = {'history': history, 'epoch': epoch._asdict()}
        checkpoints.save_latest(int(state.step) + len(history), state, progress)

    batches = task.load_batches(state)
    with open_curves(workdir / 'tensorboard', int(state.step) + 1) as add_point, hold_stop_signals() as signals:
        while not is_finished(history, schedule):
            state, epoch = _train_epoch(
                state,
                epoch,
                task,
                schedule,
                batches,
                number=len(history) + 1,
                save=save,
                signals=signals,
                add_point=add_point,
            )
            start = time.perf_counter()
            try:
                with signals.let_through():
                    val_loss, val_score = task.validate(state.variables)
            except KeyboardInterrupt as interrupt:
                save(state, epoch)
                raise Stopped(f'saved before the validation of epoch {len(history) + 1}') from interrupt
            entry = {
                'epoch': len(history) + 1,
                'step': int(state.step),
                'train_loss': epoch.loss / epoch.weight,
                f'train_{task.score}': epoch.correct / epoch.count,
                'seconds': round(epoch.seconds, 3),
                'examples_per_second': round(schedule.steps_per_epoch * schedule.examples_per_step / epoch.seconds, 1),
                'val_loss': val_loss,
                f'val_{task.score}': val_score,
                'val_seconds': round(time.perf_counter() - start, 3),
            }
            if not math.isfinite(val_loss):
                raise UserError(
                    f'the validation loss of epoch {entry["epoch"]} is not finite ({val_loss}): lower '
                    '--config.train.learning_rate; earlier checkpoints are kept'
                )
            history.append(entry)
            epoch = Epoch()
            is_best = find_best_epoch([e['val_loss'] for e in history], schedule.min_delta) == entry['epoch']
            # Save the best first: a run killed in between repeats this epoch and finds the same best.
            if is_best:
                checkpoints.save_best(entry['step'] + len(history), state)
            save(state, epoch)
            write_history(workdir, history)
            for name in ('train_loss', f'train_{task.score}', 'val_loss', f'val_{task.score}'):
                add_point(f'epoch/{name}', entry[name], entry['step'])
            log.info(
                'epoch %d: train loss %.4f %s %.3f, validation loss %.4f %s %.3f%s (%.0f examples/s)',
                entry['epoch'],
                entry['train_loss'],
                task.score,
                entry[f'train_{task.score}'],
                entry['val_loss'],
                task.score,
                entry[f'val_{task.score}'],
                ', best so far' if is_best else '',
                entry['examples_per_second'],
            )
    return history


def is_finished(history: Sequence[dict], schedule: Schedule) -> bool:
    """Returns whether all epochs are done or patience is exhausted."""
    best = find_best_epoch([entry['val_loss'] for entry in history], schedule.min_delta)
    return len(history) >= schedule.num_epochs or len(history) - best >= schedule.patience


def _train_epoch(
    state: TrainState,
    epoch: Epoch,
    task: Task,
    schedule: Schedule,
    batches: Iterator[dict],
    *,
    number: int,
    save: Callable[[TrainState, Epoch], None],
    signals: StopSignals,
    add_point: Callable[[str, float, int], None],
) -> tuple[TrainState, Epoch]:
    """Trains to the end of epoch `number`; `epoch` holds the totals of the steps already done."""
    first = (number - 1) * schedule.steps_per_epoch
    done = int(state.step) - first
    seconds_before, start = epoch.seconds, time.perf_counter()
    under_way: list[tuple[int, dict]] = []  # number and sums of the steps not read yet

    def read(num_steps: int) -> None:
        nonlocal epoch
        for k, sums in jax.device_get(under_way[:num_steps]):
            loss = float(sums['loss'] / sums['weight'])
            if not all(math.isfinite(value) for value in sums.values()):
                raise UserError(
                    f'step {k} is not finite: loss {loss}, norm of the gradient {sums["gradient_norm"]}, '
                    f'{task.describe_step(k)}: lower --config.train.learning_rate, or check these images; earlier '
                    'checkpoints are kept'
                )
            epoch = epoch.add(sums)
            if (k + 1 - first) % LOG_EVERY_STEPS == 0:
                rate = (k + 1 - first - done) * schedule.examples_per_step / (time.perf_counter() - start)
                bar.set_postfix_str(f'loss {loss:.3f}, {rate:.0f} examples/s', refresh=False)
                add_point('step/train_loss', loss, k + 1)
        del under_way[:num_steps]
        epoch = epoch._replace(seconds=seconds_before + time.perf_counter() - start)

    title = f'epoch {number}/{schedule.num_epochs}'
    with open_progress(title, schedule.steps_per_epoch, 'step', initial=done, is_shown=is_first()) as bar:
        for k in range(first + done, first + schedule.steps_per_epoch):
            state, sums = task.step(state, next(batches))
            under_way.append((k, sums))
            # The device computes this step while the host reads earlier ones.
            if len(under_way) > LOG_EVERY_STEPS:
                read(LOG_EVERY_STEPS)
            bar.update()
            stopping = signals.is_due(k + 1)
            if stopping or (schedule.checkpoint_steps and (k + 1) % schedule.checkpoint_steps == 0):
                read(len(under_way))
                save(state, epoch)
            if stopping:
                raise Stopped(f'saved after step {k + 1}')
        read(len(under_way))
    return state, epoch


def write_history(workdir: Path, history: Sequence[dict]) -> None:
    """Rewrites metrics.jsonl, one line per epoch, so that a resumed run neither loses nor repeats a line.

    Deletes the file if no epoch is finished. With several processes only the first writes.
    """
    if not is_first():
        return
    if not history:
        (workdir / 'metrics.jsonl').unlink(missing_ok=True)
        return
    with replace_file(workdir / 'metrics.jsonl') as temporary:
        temporary.write_text(''.join(json.dumps(entry) + '\n' for entry in history))


def read_history(workdir: Path) -> list[dict]:
    """Reads metrics.jsonl: one dict per finished epoch.

    Raises:
      UserError: the run has not finished its first epoch, or the file is damaged.
    """
    try:
        return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    except FileNotFoundError as error:
        raise UserError(f'{workdir} has no finished epoch yet: train first') from error
    except ValueError as error:
        raise UserError(
            f'{workdir / "metrics.jsonl"} is damaged ({error}): put a copy back, or train in another --workdir'
        ) from error
