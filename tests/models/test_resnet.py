import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from flax.traverse_util import flatten_dict

from covidjax.models.resnet import Conv1x1, Conv3x3, ResNet
from tests.variables import draw_variables


def count_parameters(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def init_shapes(model, size):
    return jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, size, size, 1)), train=False), jax.random.key(0))


def test_default_is_resnet50():
    variables = init_shapes(ResNet(), 224)
    assert count_parameters(variables['params']) == 23_508_032
    # torchvision's ResNet-50 has 49 convolutions on the main path and 4 on shortcuts.
    kernels = [path for path in flatten_dict(variables['params'], sep='/') if path.endswith('kernel')]
    assert len([path for path in kernels if 'downsample' not in path]) == 49
    assert len([path for path in kernels if 'downsample' in path]) == 4


def test_resnet18_has_its_published_size():
    # torchvision's resnet18 has 11,689,512 parameters, 513,000 of them in the classifier.
    variables = init_shapes(ResNet(stage_sizes=(2, 2, 2, 2), block='basic'), 224)
    assert count_parameters(variables['params']) == 11_689_512 - 513_000


@pytest.mark.parametrize(
    ('stem', 'block', 'size', 'expected'),
    [
        ('imagenet', 'bottleneck', 224, [(56, 256), (28, 512), (14, 1024), (7, 2048)]),
        ('small', 'basic', 64, [(32, 64), (16, 128), (8, 256), (4, 512)]),
        ('imagenet', 'basic', 65, [(17, 64), (9, 128), (5, 256), (3, 512)]),  # rounds odd sizes like torchvision
    ],
)
def test_stage_shapes(stem, block, size, expected):
    model = ResNet(stem=stem, block=block)
    outputs = jax.eval_shape(
        lambda key: model.init_with_output(key, jnp.zeros((1, size, size, 1)), train=False)[0], jax.random.key(0)
    )
    assert [o.shape[1:] for o in outputs] == [(side, side, channels) for side, channels in expected]


@pytest.mark.parametrize(('size', 'stride'), [(6, 1), (6, 2), (7, 2)])
def test_convolutions_against_scipy(size, stride):
    image = np.random.default_rng(0).normal(size=(1, size, size, 2)).astype(np.float32)
    for module, pad in ((Conv1x1(3, stride), 0), (Conv3x3(3, stride), 1)):
        actual, variables = module.init_with_output(jax.random.key(1), image)
        kernel = np.asarray(jax.tree.leaves(variables)[0])
        kernel = kernel.reshape((2 * pad + 1, 2 * pad + 1, 2, 3))
        padded = np.pad(image[0], ((pad, pad), (pad, pad), (0, 0)))
        for out in range(3):
            full = sum(scipy.signal.correlate2d(padded[..., i], kernel[..., i, out], 'valid') for i in range(2))
            np.testing.assert_allclose(actual[0, ..., out], full[::stride, ::stride], atol=1e-5)


def test_batch_statistics_move_by_a_tenth():
    model = ResNet(stage_sizes=(1,), width=4, block='basic', stem='small')
    image = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    variables = draw_variables(model, image, train=False)
    _, updates = jax.jit(functools.partial(model.apply, train=True, mutable=['batch_stats']))(variables, image)
    kernel = variables['params']['conv1']['kernel'].sum(2, keepdims=True)  # three equal channels
    convolved = jax.lax.conv_general_dilated(
        image, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )
    before = variables['batch_stats']['bn1']
    statistics = updates['batch_stats']['bn1']
    np.testing.assert_allclose(statistics['mean'], 0.9 * before['mean'] + 0.1 * convolved.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(statistics['var'], 0.9 * before['var'] + 0.1 * convolved.var((0, 1, 2)), rtol=1e-4)
