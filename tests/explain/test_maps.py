"""Maps of tiny models against hand-computed maps, and their controls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.explain import maps
from covidjax.explain.evidence import remove_attention
from covidjax.models.att2 import Att2, normalise
from tests.variables import draw_variables


def create_model(compatibility='additive'):
    return Att2(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1, compatibility=compatibility)


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1)).astype(np.uint8)


@pytest.fixture(scope='module', params=['additive', 'tanh'])
def model_and_variables(request):
    model = create_model(request.param)
    return model, draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)


def test_explanations_are_those_of_the_model(model_and_variables, images):
    model, variables = model_and_variables
    explained = maps.explain(model, variables, images)
    outputs = jax.jit(functools.partial(model.apply, train=False))(variables, normalise(jnp.asarray(images)))
    np.testing.assert_allclose(explained.probabilities, jax.nn.softmax(outputs.logits), atol=1e-5)
    for ours, theirs in zip(explained.attention, outputs.attention, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    for ours, theirs in zip(explained.evidence, outputs.evidence, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_grad_cam_says_nothing_that_evidence_does_not(images):
    """Grad-CAM of the last stage is max(<w_c, x_i>, 0) / N under 'additive': module 2's evidence without attention.

    The mean derivative of the logit by the features is w_c / N: the derivatives of the attentions cancel in the mean.
    It is computed numerically here, with the head by hand.
    """
    model = create_model()
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)
    evaluate = functools.partial(model.apply, train=False, capture_intermediates=True, mutable=['intermediates'])
    _, found = jax.jit(evaluate)(variables, normalise(jnp.asarray(images)))
    x1, x2 = (np.asarray(x, np.float64) for x in found['intermediates']['backbone']['__call__'][0][-2:])
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])

    def score(last, label):
        contexts = []
        for x, name in ((x1, 'attention1'), (last, 'attention2')):
            flat = x.reshape(len(x), -1, x.shape[-1])
            u = params[name]['u'][:, 0]
            scores = flat @ (params[name]['W_p'] @ u if 'W_p' in params[name] else u)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            contexts.append((weights[..., None] * flat).sum(1))
        dense = params['classifier']
        return (np.concatenate(contexts, 1) @ dense['kernel'] + dense['bias'])[:, label]

    n, h, w, c = x2.shape
    weights, step = np.zeros((n, c)), 1e-5
    for channel in range(c):
        for i, j in np.ndindex(h, w):
            up, down = x2.copy(), x2.copy()
            up[:, i, j, channel] += step
            down[:, i, j, channel] -= step
            weights[:, channel] += (score(up, 1) - score(down, 1)) / (2 * step) / (h * w)
    expected = np.maximum(np.einsum('nhwc,nc->nhw', x2, weights), 0)
    explained = maps.explain(model, variables, images)
    scores = remove_attention(explained.evidence[1], explained.attention[1])[..., 1]
    np.testing.assert_allclose(np.maximum(scores, 0) / (h * w), expected, atol=1e-3 * expected.max())


def test_more_slices_than_a_batch_come_back_in_order(monkeypatch, images):
    model = create_model()
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)
    whole = maps.explain(model, variables, images)
    monkeypatch.setattr(maps, 'BATCH_SIZE', 2)
    parts = maps.explain(model, variables, images)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_shuffled_tail_changes_nothing_under_additive_only(model_and_variables, images):
    model, variables = model_and_variables
    control, classifier, *_ = maps.compute_randomisation(model, variables, images, [0, 1, 2])
    assert control['shuffled'] == 'tail only'
    assert classifier['shuffled'] == 'classifier'
    assert classifier['changed'] > 1e-3
    assert classifier['attention'] == pytest.approx(1, abs=1e-6)  # class-agnostic
    assert classifier['evidence'] < 0.999
    if model.compatibility == 'additive':
        assert control['changed'] < 1e-5
        assert control['attention'] > 0.999
        assert control['evidence'] > 0.999
    else:
        assert control['changed'] > 1e-5


def test_half_pixel_centres():
    up = maps.upsample(np.array([[[0.0, 1.0]] * 2]), 4)
    # Output centres lie at 0.25, 0.75, 1.25 and 1.75 in input pixels, input centres at 0.5 and 1.5.
    np.testing.assert_allclose(up[0, 0], [0, 0.25, 0.75, 1], atol=1e-6)


def test_combination_and_region_by_hand():
    first = np.array([[[0.1, 0.4], [0.1, 0.4]]])
    second = np.array([[[0.4, 0.4], [0.1, 0.1]]])
    combined = maps.combine_attention((first, second), 2)
    expected = np.sqrt(first * second)[0]
    np.testing.assert_allclose(combined[0], (expected - 0.1) / 0.3, atol=1e-6)
    np.testing.assert_array_equal(maps.segment(combined)[0], [[False, True], [False, False]])


def test_flat_map_is_zero_with_an_empty_region():
    flat = np.full((1, 4, 4), 1 / 16)
    assert not maps.combine_attention((flat, flat), 8).any()
    assert not maps.segment(maps.scale_to_unit(flat)).any()


def predict_brightness(images):
    """A classifier that sees the upper left quarter only."""
    p = images[:, :8, :8, 0].mean((1, 2)) / 255
    return np.stack([p, 1 - p], 1)


def make_quarter():
    image = np.zeros((1, 16, 16, 1), np.uint8)
    image[:, :8, :8] = 250
    return image


def test_erasure_tells_a_good_map_from_an_inverted_one():
    image = make_quarter()
    good = image[..., 0] / 250
    curves = {
        name: maps.compute_erasure_curves(predict_brightness, image, m, [0])
        for name, m in (('good', good), ('inverted', 1 - good))
    }
    # Both maps share the ends of their curves: the intact slice and the blurred one.
    for a, b in (curves['good'], curves['inverted']), (curves['inverted'], curves['good']):
        for kind in ('deletion', 'insertion'):
            assert a[kind][0, [0, -1]] == pytest.approx(b[kind][0, [0, -1]])
    assert curves['good']['deletion'][0, 0] == pytest.approx(250 / 255)
    assert curves['good']['deletion'].mean() < curves['inverted']['deletion'].mean()
    assert curves['good']['insertion'].mean() > curves['inverted']['insertion'].mean()
    # After a quarter of the pixels the whole bright quarter is blurred, so nothing more changes.
    quarter = maps.NUM_STEPS // 4
    np.testing.assert_allclose(curves['good']['deletion'][0, quarter:], curves['good']['deletion'][0, -1])


def test_occlusion_finds_the_quarter_that_counts():
    falls = maps.compute_occlusion(predict_brightness, make_quarter(), [0], num_cells=2)[0]
    assert falls[0, 0] > 0.05
    assert falls[0, 1] == falls[1, 0] == falls[1, 1] == 0
