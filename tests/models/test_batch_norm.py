import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.models.batch_norm import EPSILON, MOMENTUM, BatchNorm
from tests.variables import draw_variables

PLAIN = nn.BatchNorm(use_running_average=False, momentum=MOMENTUM, epsilon=EPSILON)


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(2, 3, size=(4, 5, 6, 7)).astype(np.float32)


def test_training_and_its_gradient_are_those_of_flax(x):
    variables = draw_variables(BatchNorm(), x, train=True)
    weights = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)

    def compute(apply):
        def loss(params, x):
            y, updates = apply({**variables, 'params': params}, x, mutable=['batch_stats'])
            return (jnp.sin(y) * weights).sum(), (y, updates['batch_stats'])

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(variables['params'], x)

    actual = compute(lambda *args, **options: BatchNorm().apply(*args, train=True, **options))
    expected = compute(PLAIN.apply)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


def test_evaluation_uses_running_statistics(x):
    variables = draw_variables(BatchNorm(), x, train=False)
    plain = nn.BatchNorm(use_running_average=True, epsilon=EPSILON).apply(variables, x)
    np.testing.assert_allclose(BatchNorm().apply(variables, x, train=False), plain, atol=1e-5)


def test_a_batch_by_hand():
    # Two values per channel: mean 2, variance 1.
    module, x = BatchNorm(), jnp.array([[1.0], [3.0]])
    variables = module.init(jax.random.key(0), x, train=True)
    y, updates = module.apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(y, [[-1], [1]], atol=1e-5)
    np.testing.assert_allclose(updates['batch_stats']['mean'], [0.2], rtol=1e-6)
    np.testing.assert_allclose(updates['batch_stats']['var'], [1.0], rtol=1e-6)


def test_mapped_over_devices_it_takes_the_statistics_of_all(x):
    # `jax.vmap` with an axis name sums over its axis as `jax.pmap` does over devices.
    variables = draw_variables(BatchNorm(), x, train=True)

    def loss(x, axis_name):
        y, _ = BatchNorm(axis_name).apply(variables, x, train=True, mutable=['batch_stats'])
        return (y**3).sum()

    expected = jax.grad(loss)(x, None)
    halves = x.reshape(2, 2, *x.shape[1:])
    actual = jax.vmap(jax.grad(lambda x: loss(x, 'devices')), axis_name='devices')(halves)
    np.testing.assert_allclose(actual.reshape(x.shape), expected, rtol=1e-3, atol=1e-3)


def test_half_precision_keeps_sums_in_single(x):
    variables = draw_variables(BatchNorm(), x, train=True)
    y, updates = BatchNorm().apply(variables, x.astype(jnp.bfloat16), train=True, mutable=['batch_stats'])
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype('float32')}
    exact, _ = BatchNorm().apply(variables, x, train=True, mutable=['batch_stats'])
    np.testing.assert_allclose(y.astype(np.float32), exact, atol=0.05)
