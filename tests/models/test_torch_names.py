import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from covidjax.models.att2 import Att2
from covidjax.models.seq import Seq
from covidjax.models.torch_names import Place, find_place, from_torch, list_shapes, to_torch
from tests.variables import draw_variables


@pytest.fixture(scope='module')
def variables():
    extractor = Att2(stage_sizes=(1, 1), width=4, tail_blocks=1)
    return draw_variables(Seq(extractor, hidden=3), jnp.zeros((1, 32, 32, 2)), jnp.array([2]))


@pytest.mark.parametrize(
    ('path', 'name'),
    [
        ('params/backbone/conv1/kernel', 'conv1.weight'),
        ('params/backbone/bn1/scale', 'bn1.weight'),
        ('batch_stats/backbone/bn1/var', 'bn1.running_var'),
        ('params/backbone/layer3_5/conv2/kernel', 'layer3.5.conv2.weight'),
        ('params/backbone/layer1_0/conv3/dense/kernel', 'layer1.0.conv3.weight'),
        ('params/backbone/layer2_0/downsample_conv/dense/kernel', 'layer2.0.downsample.0.weight'),
        ('batch_stats/backbone/layer2_0/downsample_bn/mean', 'layer2.0.downsample.1.running_mean'),
        ('params/backbone/_conv_stem/kernel', '_conv_stem.weight'),
        ('params/backbone/_blocks_10/_expand_conv/dense/kernel', '_blocks.10._expand_conv.weight'),
        ('params/backbone/_blocks_0/_depthwise_conv/kernel', '_blocks.0._depthwise_conv.weight'),
        ('batch_stats/backbone/_blocks_3/_bn2/var', '_blocks.3._bn2.running_var'),
        ('params/tail_2/conv1/dense/kernel', 'tail.2.conv1.weight'),
        ('params/attention1/W_p', 'attention1.W_p.weight'),
        ('params/attention2/u', 'attention2.u.weight'),
        ('params/classifier/kernel', 'classifier.weight'),
        ('params/extractor/backbone/layer1_0/bn2/bias', 'extractor.layer1.0.bn2.bias'),
        ('params/sequence/attention/W_g/bias', 'sequence.attention.W_g.bias'),
    ],
)
def test_names(path, name):
    assert find_place(path) == Place(name)


@pytest.mark.parametrize(
    ('path', 'place'),
    [
        ('params/sequence/forward/ii/kernel', Place('sequence.lstm.weight_ih_l0', 0)),
        ('params/sequence/forward/hf/kernel', Place('sequence.lstm.weight_hh_l0', 1)),
        ('params/sequence/backward/hg/bias', Place('sequence.lstm.bias_hh_l0_reverse', 2)),
        ('params/backward/io/kernel', Place('lstm.weight_ih_l0_reverse', 3)),
    ],
)
def test_gates(path, place):
    assert find_place(path) == place


def test_resnet50_has_the_arrays_of_torchvisions_file():
    shapes = jax.eval_shape(
        lambda key: Att2().init(key, jnp.zeros((1, 64, 64, 1)), train=False, full=True), jax.random.key(0)
    )
    by_name = list_shapes({name: {'backbone': shapes[name]['backbone']} for name in shapes})
    # torchvision's resnet50 state dict: 320 entries, 53 of them num_batches_tracked, 2 of the classifier.
    assert len(by_name) == 320 - 53 - 2
    assert by_name['conv1.weight'] == (64, 3, 7, 7)
    assert by_name['layer1.0.downsample.0.weight'] == (256, 64, 1, 1)
    assert by_name['layer4.2.conv2.weight'] == (512, 512, 3, 3)
    assert by_name['layer4.2.bn3.running_var'] == (2048,)


def test_there_and_back_is_exact(variables):
    tensors = to_torch(variables)
    assert {name: tensor.shape for name, tensor in tensors.items()} == list_shapes(variables)
    back = from_torch(tensors, jax.eval_shape(lambda: variables))
    assert jax.tree.structure(back) == jax.tree.structure(variables)
    jax.tree.map(np.testing.assert_array_equal, back, variables)
    assert sum(tensor.size for tensor in tensors.values()) == (
        sum(leaf.size for leaf in jax.tree.leaves(variables)) + 2 * 4 * 3  # PyTorch's second biases
    )


def test_the_light_model_has_the_arrays_of_its_library_there_and_back():
    model = Att2(backbone='efficientnet_lite0')
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)
    tensors = to_torch(variables)
    # The library's state dict: 296 entries, 49 of them num_batches_tracked, 2 of its classifier.
    assert len([name for name in tensors if name.startswith('_')]) == 296 - 49 - 2
    assert tensors['_blocks.0._depthwise_conv.weight'].shape == (32, 1, 3, 3)
    kernel = variables['params']['backbone']['_blocks_3']['_depthwise_conv']['kernel']
    assert tensors['_blocks.3._depthwise_conv.weight'][7, 0, 1, 2] == kernel[1, 2, 0, 7]
    jax.tree.map(np.testing.assert_array_equal, from_torch(tensors, jax.eval_shape(lambda: variables)), variables)


def test_layouts(variables):
    flat, tensors = flatten_dict(variables, sep='/'), to_torch(variables)
    image, backbone = 'extractor.', 'params/extractor/backbone'
    assert tensors[f'{image}conv1.weight'][3, 2, 1, 0] == flat[f'{backbone}/conv1/kernel'][1, 0, 2, 3]
    kernel = flat[f'{backbone}/layer1_0/conv3/dense/kernel']
    np.testing.assert_array_equal(tensors[f'{image}layer1.0.conv3.weight'][:, :, 0, 0], kernel.T)
    np.testing.assert_array_equal(tensors[f'{image}attention1.W_p.weight'], flat['params/extractor/attention1/W_p'].T)
    cell = 'params/sequence/backward'
    weight, bias = (tensors[f'sequence.lstm.{kind}_hh_l0_reverse'] for kind in ('weight', 'bias'))
    for i, gate in enumerate('ifgo'):
        np.testing.assert_array_equal(weight[3 * i : 3 * i + 3], flat[f'{cell}/h{gate}/kernel'].T)
        np.testing.assert_array_equal(bias[3 * i : 3 * i + 3], flat[f'{cell}/h{gate}/bias'])


def test_both_biases_of_an_lstm_count(variables):
    tensors = to_torch(variables)
    tensors['sequence.lstm.bias_ih_l0'] = np.full(12, 0.5, np.float32)
    params = from_torch(tensors, variables)['params']['sequence']
    before = variables['params']['sequence']
    np.testing.assert_allclose(params['forward']['hf']['bias'], before['forward']['hf']['bias'] + 0.5)
    np.testing.assert_array_equal(params['backward']['hf']['bias'], before['backward']['hf']['bias'])
