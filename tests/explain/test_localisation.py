import numpy as np
import pytest

from covidjax.data.lesions import LesionSlice
from covidjax.explain import localisation


def test_perfect_inverted_and_centre_maps():
    lesion = np.zeros((32, 32), bool)
    lesion[14:18, 14:18] = True
    slices = [LesionSlice('a', 'a', 2, np.zeros((32, 32, 1), np.uint8), lesion, None)]

    def score(scores):
        found = localisation.score_maps(scores[None], scores[None] > 0.5, slices)
        return {name: value['mean'] for name, value in found.items()}

    assert score(lesion.astype(float)) == {
        'pointing': 1,
        'energy_lesion': 1,
        'energy_lung': None,
        'auc': 1,
        'dice': 1,
    }
    inverted = score(1.0 - lesion)
    assert (inverted['pointing'], inverted['energy_lesion'], inverted['auc'], inverted['dice']) == (0, 0, 0, 0)
    assert score(localisation.create_centre_map(32))['auc'] > 0.99


def test_slice_attention_by_hand():
    attention = [np.array([0.1, 0.6, 0.2, 0.1]), np.array([0.7, 0.1, 0.1, 0.1]), np.array([0.5, 0.5])]
    shows = [np.array([0, 1, 0, 0], bool), np.array([0, 1, 0, 0], bool), np.array([1, 1], bool)]
    found = {name: value['mean'] for name, value in localisation.score_slice_attention(attention, shows).items()}
    assert found['auc'] == pytest.approx((1 + 1 / 3) / 2)  # in the second scan the slice ties with two and is below one
    assert found['hit@1'] == 0.5
    assert found['chance@1'] == pytest.approx(1 / 4)
    assert found['hit@3'] == 1
    assert found['chance@3'] == pytest.approx(3 / 4)
