import numpy as np
import pytest

from covidjax.explain import evidence, maps
from covidjax.models.att2 import Att2
from tests.variables import draw_variables


@pytest.mark.parametrize('size', [8, 16, 21])  # 21 is no multiple of 4
def test_spreading_keeps_the_sum_of_every_position(size):
    for i, j in np.ndindex(4, 2):
        share = np.zeros((1, 4, 2, 1), np.float32)
        share[0, i, j] = -2
        pixels = np.asarray(evidence.spread(share, size))
        assert pixels.shape == (1, size, size, 1)
        assert pixels.sum() == pytest.approx(-2, abs=1e-5)
        assert (pixels <= 0).all()


def test_spreading_is_bilinear_with_half_pixel_centres():
    rng = np.random.default_rng(0)
    shares = rng.normal(size=(2, 4, 4, 1)).astype(np.float32)
    pixels = np.asarray(evidence.spread(shares, 16))[..., 0]
    np.testing.assert_allclose(pixels, maps.upsample(shares[..., 0], 16) / 16, atol=1e-6)


@pytest.mark.parametrize('mirror', [False, True])
def test_pixels_of_both_modules_add_up_to_the_logits(mirror):
    model = Att2((1, 1), width=4, block='basic', stem='small', tail_blocks=1, mirror=mirror)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1)).astype(np.uint8)
    variables = draw_variables(model, np.zeros((1, 32, 32, 1), np.float32), train=False, full=True)
    explained = maps.explain(model, variables, images)
    pixels = np.asarray(evidence.combine_evidence(explained.evidence, 32, 'concat'))
    logits = pixels.sum((1, 2)) + variables['params']['classifier']['bias']
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(explained.probabilities, expected, atol=1e-5)


def test_average_gives_the_mean_of_both_modules():
    first, second = np.full((1, 2, 2, 3), 1.0, np.float32), np.full((1, 1, 1, 3), 2.0, np.float32)
    pixels = evidence.combine_evidence((first, second), 4, 'average')
    np.testing.assert_allclose(pixels.sum((1, 2)), [[3, 3, 3]], atol=1e-6)


def test_comparisons_of_classes_by_hand():
    shares = np.array([[[[1.0, 2.0, 5.0]]], [[[1.0, 2.0, 5.0]]]])
    found = evidence.contrast(shares, np.array([0, 2]))
    assert {name: values.ravel().tolist() for name, values in found.items()} == {
        'predicted class': [1, 5],
        'COVID-19 less pneumonia': [3, 3],
        'sick less normal': [2.5, 2.5],
    }


def test_evidence_without_attention():
    attention = np.array([[[0.25, 0.0]]])
    scores = evidence.remove_attention(np.array([[[[1.0, -2.0], [0.0, 0.0]]]]), attention)
    np.testing.assert_array_equal(scores, [[[[4, -8], [0, 0]]]])


def test_signed_scale_keeps_zero():
    np.testing.assert_array_equal(
        evidence.scale_signed(np.array([[[1.0, -4.0]], [[0.0, 0.0]]])), [[[0.25, -1]], [[0, 0]]]
    )
