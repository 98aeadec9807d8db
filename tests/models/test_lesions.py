import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.models.lesions import LesionNet, _double
from tests.variables import draw_variables


@pytest.fixture(scope='module')
def model_and_variables():
    model = LesionNet(mirror=False)
    return model, draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False)


def test_number_of_parameters():
    params = jax.eval_shape(
        lambda key: LesionNet().init(key, jnp.zeros((1, 32, 32, 1)), train=False), jax.random.key(0)
    )['params']
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    # EfficientNet-Lite0 without its head; three 3x3 convolutions with scale and bias; three outputs.
    backbone = 3_371_008 - 320 * 1280 - 2 * 1280
    decoder = 9 * ((320 + 112) * 64 + (64 + 40) * 48 + (48 + 24) * 32) + 2 * (64 + 48 + 32)
    assert count == backbone + decoder + 33 * 3
    assert f'{count:,} parameters' in LesionNet.__doc__


def test_double_repeats_rows_and_columns():
    x = jnp.arange(6.0).reshape(1, 2, 3, 1)
    np.testing.assert_array_equal(_double(x), x.repeat(2, 1).repeat(2, 2))


def test_mirrored_evaluation_commutes_with_mirroring(model_and_variables):
    model, variables = model_and_variables
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 64, 64, 1)), jnp.float32)
    evaluate = jax.jit(functools.partial(model.apply, train=False))
    plain = evaluate(variables, images)
    assert plain.shape == (2, 16, 16, 3)
    mirrored = evaluate(variables, images[:, :, ::-1])[:, :, ::-1]
    assert not np.allclose(plain, mirrored, atol=1e-3)
    both = jax.jit(functools.partial(model.clone(mirror=True).apply, train=False))
    np.testing.assert_allclose(both(variables, images), (plain + mirrored) / 2, atol=1e-5)


def test_sides_must_be_multiples_of_32(model_and_variables):
    model, variables = model_and_variables
    with pytest.raises(ValueError, match='multiples of 32'):
        model.apply(variables, jnp.zeros((1, 48, 64, 1)), train=False)
