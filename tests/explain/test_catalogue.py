import numpy as np
import pytest

from covidjax.explain import catalogue
from covidjax.explain.maps import Explanations

SIZE = 16


@pytest.fixture
def explained():
    rng = np.random.default_rng(0)
    attention = tuple(rng.dirichlet(np.ones(n * n), 3).reshape(3, n, n) for n in (4, 2))
    evidence = tuple(rng.normal(size=(3, n, n, 3)).astype(np.float32) for n in (4, 2))
    return Explanations(rng.dirichlet(np.ones(3), 3), attention, evidence)


def test_maps_by_name(explained):
    maps = catalogue.compute_maps(explained, SIZE, 'concat')
    assert len(maps) == 12
    images = np.random.default_rng(1).integers(0, 256, (3, SIZE, SIZE, 1)).astype(np.uint8)
    lungs = np.zeros((3, SIZE, SIZE), bool)
    lungs[:, 4:9, 3:12] = True
    controls = catalogue.compute_controls(images, lungs)
    assert set(catalogue.CONTROLS) < set(controls)
    inside = catalogue.restrict(maps, lungs)
    assert len(inside) == len(maps)
    for values in (maps | inside | controls).values():
        assert values.shape == (3, SIZE, SIZE)
        assert values.min() >= 0
        assert values.max() <= 1


def test_inside_the_lungs_the_order_stays_and_outside_is_lowest(explained):
    name = 'evidence, sick less normal'
    maps = catalogue.compute_maps(explained, SIZE, 'concat')
    lungs = np.zeros((3, SIZE, SIZE), bool)
    lungs[:, 4:9, 3:12] = True
    inside = catalogue.restrict({name: maps[name]}, lungs)[name + catalogue.IN_LUNGS]
    for before, after, lung in zip(maps[name], inside, lungs, strict=True):
        np.testing.assert_array_equal(np.argsort(before[lung], kind='stable'), np.argsort(after[lung], kind='stable'))
        assert after[lung].min() > after[~lung].max()


def test_no_preference_inside_the_lungs_is_flat_there():
    lungs = np.zeros((1, 8, 8), bool)
    lungs[:, 2:5, 2:5] = True
    controls = catalogue.compute_controls(np.zeros((1, 8, 8, 1), np.uint8), lungs)
    flat = controls[catalogue.FLAT + catalogue.IN_LUNGS]
    assert len(np.unique(flat[lungs])) == 1
    assert flat[lungs].min() > 0
    assert np.unique(flat[~lungs]).tolist() == [0]
