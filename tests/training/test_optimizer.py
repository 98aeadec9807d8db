import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covidjax.training.optimizer import create_optimizer, create_schedule
from covidjax.training.state import create_train_state

PARAMS = {'body': {'w': np.array([1.0, -2.0])}, 'tail_0': {'w': np.array([3.0])}}
GRADIENTS = {'body': {'w': np.array([0.5, -0.1])}, 'tail_0': {'w': np.array([7.0])}}


def run(optimizer, num_steps=3):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optimizer.init(params)
    for _ in range(num_steps):
        updates, state = optimizer.update(GRADIENTS, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def adam_by_hand(w, gradient, *, learning_rate, decoupled=0.0, l2=0.0, num_steps=3):
    m = v = np.zeros_like(w)
    for t in range(1, num_steps + 1):
        g = gradient + l2 * w
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w - learning_rate * (step + decoupled * w)
    return w


@pytest.mark.parametrize(
    ('weight_decay', 'decay', 'by_hand'),
    [(0.0, 'decoupled', {}), (0.2, 'decoupled', {'decoupled': 0.2}), (0.2, 'l2', {'l2': 0.2})],
)
def test_update_by_hand(weight_decay, decay, by_hand):
    optimizer = create_optimizer(
        optax.constant_schedule(0.01), weight_decay=weight_decay, decay=decay, is_frozen=lambda path: False
    )
    params, _ = run(optimizer)
    expected = adam_by_hand(PARAMS['body']['w'], GRADIENTS['body']['w'], learning_rate=0.01, **by_hand)
    np.testing.assert_allclose(params['body']['w'], expected, rtol=1e-5)


@pytest.mark.parametrize('decay', ['decoupled', 'l2'])
def test_frozen_parameters_do_not_move_and_have_no_moments(decay):
    optimizer = create_optimizer(
        optax.constant_schedule(0.01), weight_decay=0.2, decay=decay, is_frozen=lambda path: path == 'tail_0/w'
    )
    params, state = run(optimizer)
    np.testing.assert_array_equal(params['tail_0']['w'], PARAMS['tail_0']['w'])
    assert not np.array_equal(params['body']['w'], PARAMS['body']['w'])
    shapes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert shapes.count((2,)) == 2  # both moments of body
    assert shapes.count((1,)) == 0  # none of tail_0


def test_cosine_schedule_by_hand():
    schedule = create_schedule('cosine', learning_rate=1.0, warmup_steps=10, total_steps=30)
    assert float(schedule(0)) == 0
    assert float(schedule(5)) == pytest.approx(0.5)
    assert float(schedule(10)) == pytest.approx(1)
    assert float(schedule(20)) == pytest.approx(0.5)
    assert float(schedule(30)) == pytest.approx(0, abs=1e-6)


def test_constant_schedule_without_warmup():
    schedule = create_schedule('constant', learning_rate=5e-4, warmup_steps=0, total_steps=30)
    assert [float(schedule(step)) for step in (0, 29, 1000)] == pytest.approx([5e-4] * 3)


def test_unknown_names():
    with pytest.raises(ValueError, match="'linear'"):
        create_schedule('linear', learning_rate=1.0, warmup_steps=0, total_steps=1)
    with pytest.raises(ValueError, match="'l1'"):
        create_optimizer(optax.constant_schedule(1.0), weight_decay=1.0, decay='l1', is_frozen=lambda path: False)


def test_average_of_the_parameters_by_hand():
    optimizer = create_optimizer(
        optax.constant_schedule(0.01),
        weight_decay=0.0,
        decay='decoupled',
        ema_decay=0.9,
        is_frozen=lambda path: path == 'tail_0/w',
    )
    variables = {'params': jax.tree.map(jnp.asarray, PARAMS), 'batch_stats': {}}
    state = create_train_state(variables, optimizer, jax.random.key(0))
    average, current = PARAMS['body']['w'], PARAMS['body']['w']
    np.testing.assert_allclose(state.variables['params']['body']['w'], average, rtol=1e-6)
    for step in (1, 2, 3):
        updates, opt_state = optimizer.update(GRADIENTS, state.opt_state, state.params)
        state = state.replace(opt_state=opt_state, params=optax.apply_updates(state.params, updates))
        current = adam_by_hand(PARAMS['body']['w'], GRADIENTS['body']['w'], learning_rate=0.01, num_steps=step)
        average = 0.9 * average + 0.1 * current
    np.testing.assert_allclose(state.params['body']['w'], current, rtol=1e-5)
    np.testing.assert_allclose(state.variables['params']['body']['w'], average, rtol=1e-5)
    np.testing.assert_array_equal(state.variables['params']['tail_0']['w'], PARAMS['tail_0']['w'])
