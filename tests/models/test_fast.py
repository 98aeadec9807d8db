import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.models.fast import (
    compile_fast,
    conv3x3,
    depthwise_conv,
    dot_general,
    dot_general_of_maps,
    materialise,
    max_pool,
)


def pool_plainly(x):
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


@pytest.mark.parametrize('shape', [(2, 8, 6, 3), (2, 7, 9, 3), (1, 1, 1, 1)])
def test_max_pool_and_its_gradient_are_the_plain_ones(shape):
    rng = np.random.default_rng(0)
    x = rng.integers(-3, 3, shape).astype(np.float32)  # many ties: the first maximum gets the gradient
    expected, pull_plainly = jax.vjp(pool_plainly, x)
    actual, pull = jax.vjp(max_pool, x)
    np.testing.assert_array_equal(actual, expected)
    g = rng.normal(size=expected.shape).astype(np.float32)
    np.testing.assert_allclose(pull(g)[0], pull_plainly(g)[0], rtol=1e-6)


def test_gradient_of_a_tie_goes_to_the_first_by_hand():
    # A 2x2 image has one window; its first pixel is the top left one.
    np.testing.assert_array_equal(
        jax.grad(lambda x: max_pool(x).sum())(jnp.ones((1, 2, 2, 1)))[0, ..., 0], [[1, 0], [0, 0]]
    )


def test_materialise_changes_neither_value_nor_gradient():
    x = np.random.default_rng(0).normal(size=(4, 5)).astype(np.float32)

    def compute(keep):
        return compile_fast(jax.value_and_grad(lambda x: (jnp.tanh(keep(x * 2)) * x).sum()))(x)

    # The two are fused differently, so a product and a sum may be rounded once or twice.
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


def pull_in(function, x, kernel, g):
    value, pull = jax.vjp(function, x, kernel)
    return [np.asarray(array, np.float32) for array in (value, *pull(g))]


def multiply(x, kernel):
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def multiply_maps(x, kernel):
    return dot_general_of_maps(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def convolve(x, kernel, stride):
    padding = ((1, 1), (1, 1))
    return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC'))


def strided(function, stride):
    return functools.partial(function, stride=stride)


@pytest.mark.parametrize(
    ('function', 'plain', 'x_shape', 'kernel_shape', 'g_shape'),
    [
        (multiply, jnp.dot, (2, 6, 7, 4), (4, 5), (2, 6, 7, 5)),
        (multiply_maps, jnp.dot, (2, 6, 7, 4), (4, 5), (2, 6, 7, 5)),
        (multiply_maps, jnp.dot, (2, 6, 7, 5), (5, 4), (2, 6, 7, 4)),
        (strided(conv3x3, 1), strided(convolve, 1), (2, 6, 7, 4), (3, 3, 4, 5), (2, 6, 7, 5)),
        (strided(conv3x3, 2), strided(convolve, 2), (2, 6, 7, 4), (3, 3, 4, 5), (2, 3, 4, 5)),
        (strided(conv3x3, 1), strided(convolve, 1), (2, 2, 1, 4), (3, 3, 4, 5), (2, 2, 1, 5)),  # smaller than a kernel
        (strided(conv3x3, 2), strided(convolve, 2), (2, 2, 4, 4), (3, 3, 4, 5), (2, 1, 2, 5)),
    ],
)
def test_products_and_convolutions_and_their_gradients_are_the_plain_ones(
    function, plain, x_shape, kernel_shape, g_shape
):
    rng = np.random.default_rng(0)
    # Integers are exact in bfloat16 and their sums are exact in float32; results are rounded to bfloat16 once.
    x, kernel, g = (rng.integers(-9, 9, shape).astype(np.float32) for shape in (x_shape, kernel_shape, g_shape))
    expected = pull_in(plain, x, kernel, g)
    for actual, wanted in zip(pull_in(function, x, kernel, g), expected, strict=True):
        np.testing.assert_array_equal(actual, wanted)
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (x, kernel, g)]
    for actual, wanted in zip(pull_in(function, *narrow), expected, strict=True):
        np.testing.assert_array_equal(actual, jnp.asarray(wanted, jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize(('height', 'width'), [(7, 9), (29, 30)])  # tiles of 2, and of 4
def test_convolution_by_tiles_and_its_gradients_are_the_plain_ones(height, width):
    rng = np.random.default_rng(0)
    x, g = (rng.normal(size=(1, height, width, c)).astype(np.float32) for c in (64, 65))
    kernel = (rng.normal(size=(3, 3, 64, 65)) / 24).astype(np.float32)
    assert 'dot' in jax.jit(strided(conv3x3, 1)).lower(x, kernel).as_text()
    expected = pull_in(strided(convolve, 1), x, kernel, g)
    for actual, wanted in zip(pull_in(strided(conv3x3, 1), x, kernel, g), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=3e-5 * np.abs(wanted).max())
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (x, kernel, g)]
    for actual, wanted in zip(pull_in(strided(conv3x3, 1), *narrow), expected, strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=0.02 * np.abs(wanted).max())


def convolve_groups(x, kernel, stride):
    return jax.lax.conv_general_dilated(
        x,
        kernel[:, :, None],
        (stride, stride),
        'SAME',  # TensorFlow's
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=x.shape[-1],
    )


DEPTHWISE_CASES = [
    (shape, size, stride)
    for shape in [(2, 8, 6, 3), (2, 7, 9, 3), (1, 2, 1, 3)]
    for size in (3, 5)
    for stride in (1, 2)
]


@pytest.mark.parametrize(('shape', 'size', 'stride'), DEPTHWISE_CASES)
def test_depthwise_convolution_and_its_gradients_are_those_of_a_grouped_one(shape, size, stride):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, kernel = rng.normal(size=shape), rng.normal(size=(size, size, shape[-1]))
        g = rng.normal(size=jax.eval_shape(strided(convolve_groups, stride), x, kernel).shape)

        def compute(function):
            value, pull = jax.vjp(strided(function, stride), x, kernel)
            return value, *pull(g)

        actual, expected = jax.jit(lambda: (compute(depthwise_conv), compute(convolve_groups)))()
    for array, wanted in zip(actual, expected, strict=True):
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize(('shape', 'size', 'stride'), [((2, 7, 8, 3), 5, 2), ((2, 7, 8, 3), 3, 1)])
def test_depthwise_convolution_of_bfloat16_sums_in_float32(shape, size, stride):
    rng = np.random.default_rng(0)
    # Integers are exact in bfloat16 and their sums are exact in float32; results are rounded to bfloat16 once.
    x, kernel = (rng.integers(-9, 9, s).astype(np.float32) for s in (shape, (size, size, shape[-1])))
    g = rng.integers(-9, 9, convolve_groups(x, kernel, stride).shape).astype(np.float32)
    expected = pull_in(strided(convolve_groups, stride), x, kernel, g)
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in (x, kernel, g)]
    for actual, wanted in zip(pull_in(strided(depthwise_conv, stride), *narrow), expected, strict=True):
        np.testing.assert_array_equal(actual, jnp.asarray(wanted, jnp.bfloat16).astype(np.float32))


def test_max_pool_of_bfloat16_stays_so():
    x = jnp.arange(16, dtype=jnp.bfloat16).reshape(1, 4, 4, 1)
    y, pull = jax.vjp(max_pool, x)
    assert (y.dtype, pull(y)[0].dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_array_equal(y[0, ..., 0].astype(np.float32), [[5, 7], [13, 15]])
