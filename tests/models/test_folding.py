"""Folded batch normalisation: equal outputs of every network, a convolution by hand, and refusal to train."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.models.att2 import Att2
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesions import LesionNet
from covidjax.models.seq import Seq

TINY = Att2(stage_sizes=(1, 1, 1, 2), width=4, tail_blocks=1)
LITE = Att2(backbone='efficientnet_lite0')


def draw_variables(model, *inputs, **options):
    """Returns variables whose batch normalisations all differ from the identity, per channel."""
    shapes = jax.eval_shape(lambda key: model.init(key, *inputs, **options), jax.random.key(0))
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = path[-1].key
        if name in ('scale', 'var'):
            return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
        fan_in = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 1
        if leaf.shape[2:3] == (1,):  # depthwise
            fan_in = np.prod(leaf.shape[:2])
        return (rng.normal(size=leaf.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def assert_equal_outputs(model, variables, *inputs, **options):
    apply = jax.jit(lambda variables: model.apply(variables, *inputs, **options))
    folded = fold_batch_norm(variables)
    assert folded.keys() == {'params'}
    expected, actual = apply(variables), apply(folded)
    scale = max(1, *(np.abs(leaf).max() for leaf in jax.tree.leaves(expected)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * scale), actual, expected)


IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)


@pytest.mark.parametrize('model', [TINY, TINY.clone(block='basic', stem='small', compatibility='dot'), LITE])
def test_slice_models_are_equal(model):
    variables = draw_variables(model, IMAGES, train=False, full=True)
    assert_equal_outputs(model, variables, IMAGES, train=False, full=True)


def test_lesion_model_is_equal():
    model = LesionNet(mirror=False)
    assert_equal_outputs(model, draw_variables(model, IMAGES, train=False), IMAGES, train=False)


def test_scan_model_is_equal():
    model, images, lengths = Seq(TINY, hidden=4), np.moveaxis(IMAGES, 0, -1)[..., 0, :][None], jnp.array([2])
    assert_equal_outputs(model, draw_variables(model, images, lengths), images, lengths)


def test_a_convolution_by_hand():
    # scale / sqrt(var + eps) = 3 / 2, so the kernel 4 becomes 6 and the bias 1 - 5 * 3 / 2 = -6.5.
    variables = {
        'params': {
            'conv1': {'dense': {'kernel': np.array([[4.0]])}},
            'bn1': {'scale': np.array([3.0]), 'bias': np.array([1.0])},
        },
        'batch_stats': {'bn1': {'mean': np.array([5.0]), 'var': np.array([4 - 1e-5])}},
    }
    folded = fold_batch_norm(variables)['params']
    np.testing.assert_allclose(folded['conv1']['dense']['kernel'], [[6]], rtol=1e-6)
    np.testing.assert_allclose(folded['bn1']['bias'], [-6.5], rtol=1e-6)
    assert fold_batch_norm({'params': folded}) == {'params': folded}


def test_folded_variables_do_not_train():
    folded = fold_batch_norm(draw_variables(TINY, IMAGES, train=False, full=True))
    with pytest.raises(ValueError, match='evaluation mode'):
        TINY.apply(folded, IMAGES, train=True, mutable=['batch_stats'])
