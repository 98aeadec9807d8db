import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covidjax.errors import UserError
from covidjax.training.checkpoints import open_checkpoints
from covidjax.training.loop import Schedule, find_best_epoch, fit, is_finished, read_history
from covidjax.training.state import create_train_state

SCHEDULE = Schedule(steps_per_epoch=3, num_epochs=4, patience=2, min_delta=0.0, checkpoint_steps=0, examples_per_step=2)


def create_state():
    variables = {'params': {'w': jnp.zeros(2)}, 'batch_stats': {'mean': jnp.zeros(())}}
    return create_train_state(variables, optax.adam(0.1), jax.random.key(7))


@jax.jit
def step(state, batch):
    """Moves the parameters by noise of the key and by the batch, so that a lost or doubled step shows."""
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


def load_batches(first_step):
    return ({'x': jnp.float32(k)} for k in itertools.count(first_step))


def run(workdir, val_losses, **changes):
    """Fits with these validation losses, counted from the epoch the run goes on with."""
    losses = iter(val_losses)
    template = jax.tree.map(ocp_shape, create_state())
    with open_checkpoints(workdir) as checkpoints:
        return fit(
            template,
            create_state,
            step,
            lambda variables: (next(losses), 0.5),
            load_batches,
            lambda k: f'files of step {k}',
            schedule=SCHEDULE._replace(**changes),
            checkpoints=checkpoints,
            workdir=workdir,
        )


def ocp_shape(leaf):
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def restore(workdir):
    template = jax.tree.map(ocp_shape, create_state())
    with open_checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(template)[0], checkpoints.restore_best(template.variables)


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
    # Losses are the numbers of the steps, each with weight 1: means of 0..2, 3..5, ...
    assert [entry['train_loss'] for entry in history] == [1, 4, 7, 10]
    assert [entry['train_accuracy'] for entry in history] == [0.5] * 4
    assert read_history(tmp_path) == history


def test_run_stops_early_and_keeps_the_best(tmp_path):
    history = run(tmp_path, [0.5, 0.3, 0.4, 0.6])
    assert len(history) == 4
    latest, best = restore(tmp_path)
    assert int(latest.step) == 12
    # batch_stats sum the batches 0, 1, 2, ...: of two epochs and of four.
    assert float(best['batch_stats']['mean']) == sum(range(6))
    assert float(latest.batch_stats['mean']) == sum(range(12))


def test_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path):
    losses = [0.5, 0.4, 0.45, 0.3]
    whole = run(tmp_path / 'whole', losses)

    def interrupt(after):
        yield from losses[:after]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / 'parts', interrupt(2))  # dies while epoch 3 is validated
    resumed = run(tmp_path / 'parts', losses[2:])
    timings = ('seconds', 'val_seconds', 'examples_per_second')
    strip = lambda history: [{k: v for k, v in e.items() if k not in timings} for e in history]  # noqa: E731
    assert strip(resumed) == strip(whole)
    for one, other in zip(
        jax.tree.leaves(restore(tmp_path / 'parts')), jax.tree.leaves(restore(tmp_path / 'whole')), strict=True
    ):
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)
    lines = (tmp_path / 'parts' / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['epoch'] for line in lines] == [1, 2, 3, 4]


def test_best_saved_before_a_kill_is_found_again(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:

        def die(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(type(checkpoints), 'save_latest', die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [0.5])  # the best of epoch 1 is on disk, its latest state is not
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
    assert run(tmp_path, []) == history  # no validation is asked for


def test_loss_that_is_not_finite(tmp_path):
    run(tmp_path, [0.5], num_epochs=1)
    with pytest.raises(UserError, match=r'epoch 2 .*learning_rate'):
        run(tmp_path, [math.nan])
    assert int(restore(tmp_path)[0].step) == 3  # the good checkpoint is still there


def test_no_epoch_yet(tmp_path):
    with pytest.raises(UserError, match='no finished epoch'):
        read_history(tmp_path)
