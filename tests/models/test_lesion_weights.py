import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from covidjax.errors import UserError
from covidjax.models import lesion_weights
from covidjax.models.lesion_weights import LesionModel, compute_digest, read_lesion_weights, write_lesion_weights
from covidjax.models.lesions import LesionNet
from tests.variables import draw_variables


@pytest.fixture(scope='module')
def lesions():
    model = LesionNet(mirror=False)
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False)
    return LesionModel('run', model, variables, 64, 0.4, 'phantoms', compute_digest(variables), 'folder')


@pytest.fixture(scope='module')
def path(lesions, tmp_path_factory):
    path = tmp_path_factory.mktemp('weights') / 'lesions.safetensors'
    write_lesion_weights(path, lesions, {'sources': ['a']})
    return path


def test_round_trip_in_half_precision(lesions, path):
    found = read_lesion_weights(path, 'box')
    assert dataclasses.replace(found, name='run', variables=lesions.variables) == lesions
    for ours, theirs in zip(jax.tree.leaves(lesions.variables), jax.tree.leaves(found.variables), strict=True):
        assert theirs.dtype == np.float32
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6)
    assert found.digest == compute_digest(found.variables)


def test_file_has_pytorchs_names_and_layouts(lesions, path):
    tensors = safetensors.numpy.load_file(path)
    kernel = lesions.variables['params']['decoder_0']['kernel']
    np.testing.assert_array_equal(tensors['decoder_0.weight'], kernel.transpose(3, 2, 0, 1).astype(np.float16))
    assert tensors['_conv_stem.weight'].shape == (32, 3, 3, 3)
    assert path.stat().st_size < 7e6


def test_digest_sees_every_weight(lesions):
    changed = jax.tree.map(np.copy, lesions.variables)
    changed['params']['classifier']['bias'][2] += 0.01
    assert compute_digest(changed) != lesions.digest


def test_the_digest_of_the_package_is_read_without_the_model():
    assert lesion_weights.read_box_digest() == lesion_weights.load_box().digest


def test_other_files_are_refused(path, tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        read_lesion_weights(tmp_path / 'absent.safetensors', '')
    broken = tmp_path / 'broken.safetensors'
    broken.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match='not a readable safetensors file'):
        read_lesion_weights(broken, '')
    other = tmp_path / 'other.safetensors'
    safetensors.numpy.save_file({'fc.weight': np.zeros((2, 2), np.float32)}, other)
    with pytest.raises(UserError, match='does not hold a lesion model'):
        read_lesion_weights(other, '')
    tensors = safetensors.numpy.load_file(path)
    del tensors['decoder_1.weight']
    with pytest.raises(UserError, match='decoder_1'):
        lesion_weights.load_lesion_tensors(tensors, other)


def test_kinds_of_files_are_told_apart(path, tmp_path):
    other = tmp_path / 'other.safetensors'
    safetensors.numpy.save_file({'_conv_stem.weight': np.zeros((2, 2), np.float32)}, other)
    assert lesion_weights.holds_lesion_weights(path)
    assert not lesion_weights.holds_lesion_weights(other)
    assert not lesion_weights.holds_lesion_weights(tmp_path / 'absent')
