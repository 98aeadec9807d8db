import numpy as np
import pytest

from covidjax.data.lesions import LesionSlice
from covidjax.explain import catalogue, scores
from covidjax.models.att2 import Att2
from tests.variables import draw_variables

MODEL = Att2((1, 1), width=4, block='basic', stem='small', tail_blocks=1)


@pytest.fixture(scope='module')
def variables():
    return draw_variables(MODEL, np.zeros((1, 32, 32, 1), np.float32), train=False, full=True)


@pytest.fixture(scope='module')
def slices():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 32, 32, 1)).astype(np.uint8)
    lesion = np.zeros((32, 32), bool)
    lesion[10:20, 5:12] = True
    return [LesionSlice(str(i), f'p{i // 2}', 2, image, lesion, None) for i, image in enumerate(images)]


def test_scores_do_not_depend_on_the_chunks(variables, slices, monkeypatch):
    def score():
        return scores.score_each_slice(
            MODEL, variables, slices, lambda name: catalogue.RANDOM not in name, lesions=None, occlusion=False
        )

    whole, chosen = score(), scores.choose_by_lesions(MODEL, variables, slices)
    monkeypatch.setattr(scores, '_CHUNK', 3)
    for name, of_map in score().items():
        assert of_map['pointing'] == pytest.approx(whole[name]['pointing'], abs=1e-6), name
        assert of_map['auc'] == pytest.approx(whole[name]['auc'], abs=1e-2), name
    assert scores.choose_by_lesions(MODEL, variables, slices) == chosen


def test_without_other_slices_the_map_is_measured_on_patients_that_it_was_not_chosen_on(variables, slices):
    found, lead = scores.lead_by_lesions(MODEL, variables, slices, [])
    assert (lead['num_slices'], lead['num_patients'], found['num_slices']) == (4, 2, 8)
    assert lead['chosen_on'] == '4 slices of every second patient'
    assert set(catalogue.CONTROLS) < set(found['maps'])
    _, other = scores.lead_by_lesions(MODEL, variables, slices, slices)
    assert (other['num_slices'], other['chosen_on']) == (8, '8 validation slices with a lesion')


def test_without_lesions_erasure_decides(variables, slices):
    images = np.stack([s.image for s in slices])
    patients = [s.patient for s in slices]
    lead = scores.lead_by_erasure(MODEL, variables, images, patients, images[:3])
    assert lead['by'] == 'erasure'
    assert list(lead['scores']) == ['insertion_less_deletion']
    assert {'chance', 'centre', 'grey'} <= set(lead['margins'])
    assert lead['num_slices'] == 8
