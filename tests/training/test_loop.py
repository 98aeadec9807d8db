import itertools
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covidjax.errors import UserError
from covidjax.training.checkpoints import has_checkpoint, open_checkpoints
from covidjax.training.digests import find_damage
from covidjax.training.interrupts import Stopped
from covidjax.training.loop import Schedule, Task, find_best_epoch, fit, is_finished, read_history
from covidjax.training.state import create_train_state

SCHEDULE = Schedule(steps_per_epoch=3, num_epochs=4, patience=2, min_delta=0.0, checkpoint_steps=0, examples_per_step=2)


def create_state():
    variables = {'params': {'w': jnp.zeros(2)}, 'batch_stats': {'mean': jnp.zeros(())}}
    return create_train_state(variables, optax.adam(0.1), jax.random.key(7))


@jax.jit
def step(state, batch):
    """Moves the parameters by the batch and by noise of the key, so that a lost or repeated step is detected."""
    noise = jax.random.normal(jax.random.fold_in(state.key, state.step), (2,))
    updates, opt_state = optax.adam(0.1).update({'w': noise + batch['x']}, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        opt_state=opt_state,
        batch_stats={'mean': state.batch_stats['mean'] + batch['x']},
    )
    sums = {'loss': batch['x'], 'weight': 1.0, 'correct': 1.0, 'count': 2.0, 'gradient_norm': abs(batch['x'])}
    return state, jax.tree.map(jnp.float32, sums)


def load_batches(state):
    return ({'x': jnp.float32(k)} for k in itertools.count(int(state.step)))


LOSSES = [0.5, 0.4, 0.45, 0.3]  # validation losses


def run(workdir, val_losses, load_batches=load_batches, **changes):
    """Runs `fit` with these validation losses, the first for the epoch that the run resumes with."""
    losses = iter(val_losses)
    template = jax.tree.map(ocp_shape, create_state())
    with open_checkpoints(workdir) as checkpoints:
        task = Task(
            template,
            create_state,
            step,
            lambda variables: (next(losses), 0.5),
            load_batches,
            lambda k: f'files of step {k}',
        )
        return fit(task, SCHEDULE._replace(**changes), checkpoints, workdir)


def ocp_shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def restore_latest(workdir):
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(jax.tree.map(ocp_shape, create_state()))


def restore_best(workdir):
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.restore_best(jax.tree.map(ocp_shape, create_state()).variables)


def restore(workdir):
    return restore_latest(workdir)[0], restore_best(workdir)


def test_best_epoch_needs_min_delta():
    assert find_best_epoch([0.5, 0.4, 0.39995, 0.41], 1e-4) == 2
    assert find_best_epoch([0.5, 0.4, 0.3998], 1e-4) == 3
    assert find_best_epoch([], 1e-4) == 0
    assert find_best_epoch([math.inf], 1e-4) == 0


def test_patience_and_last_epoch_end_a_run():
    def history(losses):
        return [{'val_loss': loss} for loss in losses]

    assert not is_finished(history([]), SCHEDULE)
    assert not is_finished(history([0.5, 0.6]), SCHEDULE)
    assert is_finished(history([0.5, 0.6, 0.7]), SCHEDULE)
    assert is_finished(history([0.5, 0.4, 0.3, 0.2]), SCHEDULE)


def test_history_by_hand(tmp_path):
    history = run(tmp_path, [0.5, 0.4, 0.3, 0.2])
    assert [entry['epoch'] for entry in history] == [1, 2, 3, 4]
    assert [entry['step'] for entry in history] == [3, 6, 9, 12]
    # The loss of a step is its number, with weight 1: means of 0..2, 3..5, ...
    assert [entry['train_loss'] for entry in history] == [1, 4, 7, 10]
    assert [entry['train_accuracy'] for entry in history] == [0.5] * 4
    assert read_history(tmp_path) == history


def test_run_stops_early_and_keeps_the_best(tmp_path):
    history = run(tmp_path, [0.5, 0.3, 0.4, 0.6])
    assert len(history) == 4
    latest, best = restore(tmp_path)
    assert int(latest.step) == 12
    # batch_stats is the sum of the batches 0, 1, 2, ...: over two epochs and over four.
    assert float(best['batch_stats']['mean']) == sum(range(6))
    assert float(latest.batch_stats['mean']) == sum(range(12))


def assert_same_end(one, other):
    """Asserts that two finished workdirs are equal bit for bit, except for timings."""
    timings = ('seconds', 'val_seconds', 'examples_per_second')
    histories = [
        [{name: value for name, value in entry.items() if name not in timings} for entry in read_history(workdir)]
        for workdir in (one, other)
    ]
    assert histories[0] == histories[1]
    for a, b in zip(jax.tree.leaves(restore(one)), jax.tree.leaves(restore(other)), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole')
    run(workdir, LOSSES)
    return workdir


def interrupt_at(step, action):
    """Returns a `load_batches` that calls `action` before batch `step`."""

    def load(state):
        for k in itertools.count(int(state.step)):
            if k == step:
                action()
            yield {'x': jnp.float32(k)}

    return load


def die():
    raise MemoryError  # simulates a killed process: the loop does not handle it


def send(number):
    return lambda: os.kill(os.getpid(), number)


def test_run_that_dies_while_it_validates_ends_as_if_it_had_not(tmp_path, whole):
    def losses(after):
        yield from LOSSES[:after]
        die()

    with pytest.raises(MemoryError):
        run(tmp_path, losses(2))
    run(tmp_path, LOSSES[2:])
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(('step', 'resumed_from'), [(1, 0), (5, 4), (7, 6)])
def test_run_that_dies_within_an_epoch_ends_as_if_it_had_not(tmp_path, whole, step, resumed_from):
    with pytest.raises(MemoryError):
        run(tmp_path, LOSSES, interrupt_at(step, die), checkpoint_steps=2)
    started = []

    def watch(state):
        started.append(int(state.step))
        return load_batches(state)

    run(tmp_path, LOSSES[resumed_from // SCHEDULE.steps_per_epoch :], watch, checkpoint_steps=2)
    assert started == [resumed_from]
    assert_same_end(tmp_path, whole)


# At the first step, within an epoch, at the last step of an epoch.
@pytest.mark.parametrize(('number', 'step'), [(signal.SIGTERM, 0), (signal.SIGINT, 4), (signal.SIGTERM, 5)])
def test_signal_saves_after_the_step_and_stops(tmp_path, whole, number, step):
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match=f'saved after step {step + 1}'):
        run(tmp_path, LOSSES, interrupt_at(step, send(number)))
    assert signal.getsignal(number) == before
    assert int(restore_latest(tmp_path)[0].step) == step + 1
    run(tmp_path, LOSSES[(step >= 3) :])
    assert_same_end(tmp_path, whole)


def test_signal_during_validation_saves_at_once(tmp_path, whole):
    def losses():
        yield LOSSES[0]
        send(signal.SIGTERM)()
        pytest.fail('validation went on')

    with pytest.raises(Stopped, match='before the validation of epoch 2'):
        run(tmp_path, losses())
    run(tmp_path, LOSSES[1:], interrupt_at(3, die))  # the updates of epoch 2 are not repeated
    assert_same_end(tmp_path, whole)


def list_checkpoints(workdir, kind='latest'):
    """Returns the checkpoint folders, newest first."""
    return sorted((workdir / 'checkpoints' / kind).iterdir(), key=lambda path: -int(path.name))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b'')


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def remove(path):
    path.unlink()


@pytest.mark.parametrize('damage', [truncate, empty, flip, remove])
def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, whole, caplog, damage):
    run(tmp_path, LOSSES, num_epochs=3)
    newest, before = list_checkpoints(tmp_path)
    # In the digest file a lost trailing line break is not detected.
    paths = [path for path in newest.rglob('*') if path.is_file() and path.name != 'sha256.json']
    path = max(paths, key=lambda path: path.stat().st_size)
    damage(path)
    run(tmp_path, LOSSES[2:])  # repeats the third epoch from the end of the second
    assert (newest.name, before.name) == ('12', '8')
    assert f'{newest}: {path.relative_to(newest)} ' in caplog.text
    assert_same_end(tmp_path, whole)


def test_every_file_of_a_checkpoint_is_watched(tmp_path):
    run(tmp_path, LOSSES, num_epochs=1)
    (folder,) = list_checkpoints(tmp_path)
    assert find_damage(folder) == []
    for path in [path for path in folder.rglob('*') if path.is_file() and path.stat().st_size]:
        content = path.read_bytes()
        flip(path)
        assert len(find_damage(folder)) == 1, path
        path.write_bytes(content)
    assert find_damage(folder) == []


def test_damaged_best_takes_a_state_from_before_it(tmp_path, whole):
    run(tmp_path, LOSSES, num_epochs=2)  # each epoch was the best so far
    flip(next(path for path in list_checkpoints(tmp_path, 'best')[0].rglob('*') if path.is_file()))
    run(tmp_path, LOSSES[1:])
    assert_same_end(tmp_path, whole)


def test_no_sound_checkpoint_is_left(tmp_path):
    run(tmp_path, LOSSES, num_epochs=2)
    for folder in list_checkpoints(tmp_path):
        empty(folder / 'sha256.json')
    with pytest.raises(UserError, match=r'8: sha256.json is unreadable; .*4: sha256.json is unreadable \(2 in all\)'):
        run(tmp_path, LOSSES)


def test_checkpoint_without_digests_was_not_finished(tmp_path, whole):
    run(tmp_path, LOSSES, num_epochs=1)
    assert has_checkpoint(tmp_path)
    (list_checkpoints(tmp_path)[0] / 'sha256.json').unlink()
    assert not has_checkpoint(tmp_path)
    run(tmp_path, LOSSES)  # starts from scratch
    assert_same_end(tmp_path, whole)


def test_damaged_best_is_not_tested(tmp_path):
    run(tmp_path, LOSSES, num_epochs=1)
    folder = list_checkpoints(tmp_path, 'best')[0]
    truncate(folder / '_CHECKPOINT_METADATA')
    with pytest.raises(
        UserError, match=f'{folder} is damaged .*_CHECKPOINT_METADATA differs from its digest in sha256.json'
    ):
        restore_best(tmp_path)


def test_best_saved_before_a_kill_is_found_again(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(type(checkpoints), 'save_latest', lambda *_: die())
    with pytest.raises(MemoryError):
        run(tmp_path, [0.5])  # saves the best of epoch 1, but not its latest state
    monkeypatch.undo()
    run(tmp_path, [0.5, 0.6, 0.7])
    assert float(restore(tmp_path)[1]['batch_stats']['mean']) == sum(range(3))


def test_best_of_another_model_is_refused_with_its_differences(tmp_path):
    run(tmp_path, [0.5], num_epochs=1)
    template = jax.tree.map(ocp_shape, create_state()).variables
    template['params'] = {'w': jax.ShapeDtypeStruct((3,), jnp.float32), 'v': jax.ShapeDtypeStruct((1,), jnp.float32)}
    template['batch_stats'] = {}
    message = r'missing params/v; left over batch_stats/mean; params/w has shape \(2,\), .* \(3 in all\)'
    with open_checkpoints(tmp_path) as checkpoints, pytest.raises(UserError, match=message):
        checkpoints.restore_best(template)


def test_finished_run_is_left_alone(tmp_path):
    history = run(tmp_path, [0.5, 0.4, 0.3, 0.2])
    assert run(tmp_path, []) == history  # runs no validation


def test_validation_loss_that_is_not_finite(tmp_path):
    run(tmp_path, [0.5], num_epochs=1)
    with pytest.raises(UserError, match=r'epoch 2 .*learning_rate'):
        run(tmp_path, [math.nan])
    assert int(restore(tmp_path)[0].step) == 3  # the good checkpoint is kept


@pytest.mark.parametrize(('name', 'bad_step'), [('loss', 5), ('gradient_norm', 17), ('loss', 29)])
def test_step_that_is_not_finite_is_named_and_not_saved(tmp_path, monkeypatch, name, bad_step):
    good = step

    def spoil(state, batch):
        number = int(state.step)
        state, sums = good(state, batch)
        return state, {**sums, name: jnp.float32(jnp.inf)} if number >= bad_step else sums

    monkeypatch.setitem(globals(), 'step', spoil)
    with pytest.raises(UserError, match=f'step {bad_step} is not finite: .*files of step {bad_step}:'):
        run(tmp_path, LOSSES, steps_per_epoch=15, checkpoint_steps=4)
    assert int(restore_latest(tmp_path)[0].step) == bad_step // 4 * 4


def test_no_epoch_yet(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, LOSSES, interrupt_at(1, send(signal.SIGTERM)))
    with pytest.raises(UserError, match='no finished epoch'):
        read_history(tmp_path)


def test_a_damaged_history_is_named(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"epoch": 1, "val_l')
    with pytest.raises(UserError, match=r'metrics.jsonl is damaged .*: put a copy back'):
        read_history(tmp_path)
