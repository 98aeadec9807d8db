import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from covidjax.models.att2 import normalise
from covidjax.models.efficientnet import EfficientNetLite0
from covidjax.models.pretrained import LITE0, find_weights
from covidjax.models.torch_files import load_torch_file
from covidjax.models.torch_names import from_torch
from tests.variables import draw_variables


def init_shapes(model, height, width):
    return jax.eval_shape(
        lambda key: model.init_with_output(key, jnp.zeros((1, height, width, 1)), train=False), jax.random.key(0)
    )


def test_it_has_its_published_size():
    _, variables = init_shapes(EfficientNetLite0(), 224, 224)
    sizes = [leaf.size for leaf in jax.tree.leaves(variables['params'])]
    # EfficientNet-Lite0 has 4,652,008 parameters, of which 1280 * 1000 + 1000 are the classifier's.
    assert sum(sizes) == 4_652_008 - 1_281_000
    assert len([name for name in variables['params'] if name.startswith('_blocks_')]) == 16


@pytest.mark.parametrize(
    ('size', 'expected'),
    [
        ((224, 224), [(56, 56, 24), (28, 28, 40), (14, 14, 112), (7, 7, 1280)]),
        ((75, 33), [(19, 9, 24), (10, 5, 40), (5, 3, 112), (3, 2, 1280)]),
    ],
)
def test_shapes_of_features(size, expected):
    features, _ = init_shapes(EfficientNetLite0(), *size)
    assert [x.shape[1:] for x in features] == expected


def test_without_the_head_the_last_features_are_those_of_the_last_block():
    features, variables = init_shapes(EfficientNetLite0(head=False), 64, 64)
    assert features[-1].shape == (1, 2, 2, 320)
    assert '_conv_head' not in variables['params']


@pytest.fixture(scope='module')
def imagenet():
    """The backbone, its ImageNet variables, and weight and bias of the file's classifier."""
    model, tensors = EfficientNetLite0(), load_torch_file(find_weights(LITE0))
    variables = from_torch(tensors, init_shapes(model, 64, 64)[1])
    return model, variables, (tensors['_fc.weight'], tensors['_fc.bias'])


def load_photograph(name, size):
    """Returns the middle of a photograph, grey [S, S, 1]."""
    image = Image.fromarray(load_sample_image(name)).convert('L')
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    image = image.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
    return np.asarray(image)[..., None]


def test_photographs_get_their_class(imagenet):
    model, variables, (weight, bias) = imagenet
    images = np.stack([load_photograph(name, 224) for name in ('china.jpg', 'flower.jpg')])
    features = jax.jit(functools.partial(model.apply, train=False))(variables, normalise(images))
    logits = np.asarray(features[-1]).mean((1, 2)) @ weight.T + bias
    best = np.argsort(-logits, axis=-1)[:, :5]
    assert 698 in best[0]  # palace
    assert 985 in best[1]  # daisy


def test_the_stem_sees_grey_values_as_in_training(imagenet):
    model, variables, _ = imagenet
    grey = np.random.default_rng(0).integers(0, 256, (1, 8, 8, 1), dtype=np.uint8)

    @jax.jit
    def compute_stem(images):  # and nothing behind it
        _, state = model.apply(variables, images, train=False, capture_intermediates=True)
        return state['intermediates']['_conv_stem']['__call__'][0]

    rgb = np.repeat((grey.astype(np.float32) - 127) / 128, 3, axis=-1)
    expected = jax.lax.conv_general_dilated(
        rgb, variables['params']['_conv_stem']['kernel'], (2, 2), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    np.testing.assert_allclose(compute_stem(normalise(grey)), expected, atol=1e-5)


def test_bfloat16_is_near_float32(imagenet):
    model, variables, _ = imagenet
    images = normalise(load_photograph('china.jpg', 64)[None])
    apply = jax.jit(functools.partial(model.apply, train=False))
    exact = apply(variables, images)
    rounded = apply(jax.tree.map(lambda x: x.astype(jnp.bfloat16), variables), images.astype(jnp.bfloat16))
    for x, y in zip(rounded, exact, strict=True):
        assert x.dtype == jnp.bfloat16
        assert np.abs(x.astype(np.float32) - y).mean() < 0.1 * np.abs(y).mean()


def test_batch_statistics_move_by_a_hundredth():
    model = EfficientNetLite0()
    image = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)
    variables = draw_variables(model, image, train=False)

    @jax.jit
    def compute_stem(variables):  # and nothing behind it
        _, state = model.apply(variables, image, train=True, mutable=['batch_stats'], capture_intermediates=True)
        return state['intermediates']['_conv_stem']['__call__'][0], state['batch_stats']['_bn0']

    convolved, after = compute_stem(variables)
    before = variables['batch_stats']['_bn0']
    np.testing.assert_allclose(after['mean'], 0.99 * before['mean'] + 0.01 * convolved.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(after['var'], 0.99 * before['var'] + 0.01 * convolved.var((0, 1, 2)), rtol=1e-4)
