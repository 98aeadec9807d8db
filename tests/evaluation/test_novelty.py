import numpy as np
import pytest

from covidjax.errors import UserError
from covidjax.evaluation.novelty import compute_novelty, fit_novelty, load_novelty, save_novelty


def draw(count, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    basis = np.random.default_rng(9).normal(size=(3, 40))
    return (rng.normal(size=(count, 3)) * scale) @ basis + 0.1 * rng.normal(size=(count, 40))


PATIENTS = [f'p{i % 20}' for i in range(400)]


def test_usual_slices_lie_within_and_others_beyond():
    novelty = fit_novelty(draw(400, 0), PATIENTS)
    assert 0.003 < (compute_novelty(novelty, draw(4000, 1)) > 1).mean() < 0.03
    assert (compute_novelty(novelty, draw(50, 2, scale=20.0)) > 1).mean() > 0.9
    # A small step off the directions along which slices differ counts as a large distance.
    assert (compute_novelty(novelty, draw(50, 3) + np.eye(40)[0] * 3) > 1).all()


def test_more_dimensions_than_examples_and_constant_embeddings():
    wide = np.random.default_rng(0).normal(size=(40, 500))
    assert np.isfinite(compute_novelty(fit_novelty(wide, PATIENTS[:40]), wide)).all()
    assert fit_novelty(np.ones((40, 8)), PATIENTS[:40]) is None


def test_channels_that_never_fired_may_fire_a_little():
    x, new = draw(400, 0), draw(50, 1)
    x[:, 7] = new[:, 7] = 0
    novelty = fit_novelty(x, PATIENTS)
    before = compute_novelty(novelty, new)
    new[:, 7] = 1e-3
    np.testing.assert_allclose(compute_novelty(novelty, new), before, rtol=0.1)
    new[:, 7] = 10
    assert (compute_novelty(novelty, new) > 1).all()


def test_too_few():
    assert fit_novelty(draw(10, 0), PATIENTS[:10]) is None
    assert fit_novelty(draw(40, 0), ['one'] * 40) is None


def test_there_and_back(tmp_path):
    novelty, x = fit_novelty(draw(400, 0), PATIENTS), draw(5, 1)
    save_novelty(tmp_path / 'n.npz', novelty)
    back = load_novelty(tmp_path / 'n.npz')
    np.testing.assert_array_equal(compute_novelty(back, x), compute_novelty(novelty, x))
    assert load_novelty(tmp_path / 'none.npz') is None
    (tmp_path / 'n.npz').write_bytes((tmp_path / 'n.npz').read_bytes()[:100])
    with pytest.raises(UserError, match='damaged'):
        load_novelty(tmp_path / 'n.npz')
