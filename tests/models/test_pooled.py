import functools

import jax
import numpy as np
import pytest

from covidjax.models.att2 import FEATURES, Att2
from covidjax.models.pooled import pool, spread_attention, spread_evidence
from tests.variables import draw_variables

MAP = np.float32([[[1, 0], [3, 0], [2, 6]]])  # [1, 3 positions, 2 channels]


def test_mean_and_maximum():
    np.testing.assert_array_equal(pool(MAP), [[[2, 2], [3, 6]]])


def test_attention_goes_where_mean_and_maxima_come_from():
    # 0.4 of attention on the mean is even; 0.6 on the maximum goes to positions 1 (channel 0) and 2 (channel 1).
    np.testing.assert_allclose(
        spread_attention(np.float32([[0.4, 0.6]]), MAP), [[0.4 / 3, 0.4 / 3 + 0.3, 0.4 / 3 + 0.3]]
    )


def test_evidence_adds_up_to_the_logit():
    attention, kernel = np.float32([[0.4, 0.6]]), np.float32([[1, 2], [0.5, -1]])
    shares = spread_evidence(attention, MAP, kernel)
    # Position 1: mean 0.4 * 3 / 3 of channel 0, maximum 0.6 * 3 of channel 0.
    np.testing.assert_allclose(shares[0, 1], [2.2, 4.4])
    context = np.einsum('bn,bnc->bc', attention, pool(MAP))
    np.testing.assert_allclose(shares.sum(1), context @ kernel)


def test_a_channel_that_is_equal_everywhere_counts_once():
    flat = np.ones((1, 4, 1), np.float32)
    np.testing.assert_allclose(spread_attention(np.float32([[0, 1]]), flat), [[1, 0, 0, 0]])


@pytest.mark.parametrize('combination', ['concat', 'average'])
@pytest.mark.parametrize('mirror', [False, True])
def test_a_pooled_model_explains_its_logits(combination, mirror):
    model = Att2((1, 1), 4, 'basic', 'small', 1, pooled=True, mirror=mirror, combination=combination)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)
    variables = draw_variables(model, images, train=False, full=True)
    outputs, found = model.apply(variables, images, train=False, mutable=['intermediates'])
    assert [maps.shape for maps in outputs.attention] == [(2, 16, 16), (2, 8, 8)]
    for maps in outputs.attention:
        np.testing.assert_allclose(maps.sum((1, 2)), 1, atol=1e-5)
    if combination == 'concat':
        shares = sum(maps.sum((1, 2)) for maps in outputs.evidence)
        bias = variables['params']['classifier']['bias']
        np.testing.assert_allclose(outputs.logits, np.asarray(shares) + bias, atol=1e-5)
    features = found['intermediates'][FEATURES]
    assert [[x.shape for x in view] for view in features] == [[(2, 2, 4), (2, 2, 8)]] * (1 + mirror)
    apply = functools.partial(jax.jit(model.apply, static_argnames='train'), variables, None, features=features)
    np.testing.assert_allclose(apply(train=False).logits, outputs.logits, atol=1e-5)
    assert apply(train=False).attention == ()
