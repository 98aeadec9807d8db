import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.fast import compile_fast, materialise, max_pool


def pool_plainly(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize('shape', [(2, 8, 6, 3), (2, 7, 9, 3), (1, 1, 1, 1)])
def test_max_pool_and_its_gradient_are_the_plain_ones(shape):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 3, shape).astype(np.float32)  # with many ties: the first maximum gets the gradient
    expected, pull_plainly = jax.vjp(pool_plainly, x)
    actual, pull = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(actual, expected)
    g = rng.normal(size=expected.shape).astype(np.float32)
    np.testing.assert_allclose(pull(g)[0], pull_plainly(g)[0], rtol=1e-6)


def test_gradient_of_a_tie_goes_to_the_first_by_hand():
    # Windows of a constant 2x2 image: one, whose first pixel is the top left.
    np.testing.assert_array_equal(
        jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))[0, ..., 0], [[1, 0], [0, 0]]
    )


def test_materialise_changes_neither_value_nor_gradient():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)

    def compute(keep):
        return compile_fast(jax.value_and_grad(lambda x: (jnp.tanh(keep(x * 2)) * x).sum()))(x)

    # Fused otherwise, so that a product and a sum may be rounded once or twice.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), compute(materialise), compute(lambda x: x))


def test_on_a_cpu_what_is_materialised_is_not_fused_into_what_uses_it():
    if jax.default_backend() != 'cpu':
        pytest.skip('the barrier is for CPUs')

    def compute(x):
        return jnp.sin(materialise(jnp.tanh(x))) + 1

    text = compile_fast(compute).lower(jnp.ones((64, 64))).compile().as_text()
    assert 'opt-barrier' in text


def test_options_of_compilation_are_passed_on():
    add = compile_fast(lambda n, x: x + n, static_argnums=0)
    assert add(2, jnp.float32(1)) == 3
