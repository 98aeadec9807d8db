import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from covidjax.models.att2 import COMBINATIONS, Att2, is_dead, normalise
from covidjax.models.attention import COMPATIBILITIES
from tests.variables import draw_variables

SMALL = functools.partial(Att2, stage_sizes=(1, 1, 1), width=8, block='basic', stem='small', tail_blocks=1)


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)


def init_shapes(model, size=224):
    return jax.eval_shape(
        lambda key: model.init_with_output(key, jnp.zeros((2, size, size, 1)), train=False, full=True),
        jax.random.key(0),
    )


def count_by_part(params):
    parts = {}
    for path, leaf in flatten_dict(params, sep='/').items():
        part = path.split('/')[0].split('_')[0]
        parts[part] = parts.get(part, 0) + int(np.prod(leaf.shape))
    return parts


def test_parameters_of_the_papers_model():
    _, variables = init_shapes(Att2())
    assert count_by_part(variables['params']) == {
        'backbone': 23_508_032,
        'tail': 13_387_776,
        'attention1': 1024 * 2048 + 2048,  # W_p and u
        'attention2': 2048,  # u alone: the widths agree
        'classifier': 3072 * 3 + 3,
    }


def test_59_layers():
    _, variables = init_shapes(Att2())
    kernels = [path for path in flatten_dict(variables['params'], sep='/') if path.endswith('kernel')]
    main_path = [path for path in kernels if 'downsample' not in path and not path.startswith('attention')]
    assert len(main_path) == 59  # 58 convolutions and the classifier


def test_shapes_of_the_papers_model():
    outputs, _ = init_shapes(Att2())
    assert outputs.logits.shape == (2, 3)
    assert outputs.embedding.shape == (2, 3072)
    assert [a.shape for a in outputs.attention] == [(2, 14, 14), (2, 7, 7)]


def test_average_has_a_classifier_for_each_module():
    _, variables = init_shapes(Att2(combination='average'))
    parts = count_by_part(variables['params'])
    assert (parts['classifier1'], parts['classifier2']) == (1024 * 3 + 3, 2048 * 3 + 3)


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
@pytest.mark.parametrize('combination', COMBINATIONS)
def test_attention_sums_to_one(images, compatibility, combination):
    model = SMALL(compatibility=compatibility, combination=combination)
    variables = draw_variables(model, images, train=False, full=True)
    outputs = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    for attention in outputs.attention:
        np.testing.assert_allclose(attention.sum((1, 2)), 1, rtol=1e-5)
        assert (attention >= 0).all()
    assert np.isfinite(outputs.logits).all()


def test_average_is_the_mean_of_probabilities(images):
    model = SMALL(combination='average')
    variables = draw_variables(model, images, train=False, full=True)
    outputs = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    contexts = outputs.embedding[:, :16], outputs.embedding[:, 16:]  # stage widths 16 and 32
    probabilities = []
    for i, context in enumerate(contexts):
        classifier = variables['params'][f'classifier{i + 1}']
        probabilities.append(jax.nn.softmax(context @ classifier['kernel'] + classifier['bias'][None]))
    np.testing.assert_allclose(jax.nn.softmax(outputs.logits), sum(probabilities) / 2, atol=1e-6)


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_tail_is_dead_under_additive_only(images, compatibility):
    model = SMALL(compatibility=compatibility)
    variables = draw_variables(model, images, train=False, full=True)

    def compute_loss(params, images):
        outputs = model.apply({**variables, 'params': params}, images, train=False, full=True)
        return (outputs.logits**2).sum()

    gradients = flatten_dict(jax.jit(jax.grad(compute_loss))(variables['params'], images), sep='/')
    largest = max(float(jnp.abs(g).max()) for g in gradients.values())
    tail = max(float(jnp.abs(g).max()) for path, g in gradients.items() if path.startswith('tail_'))
    if compatibility == 'additive':
        assert tail < 1e-6 * largest
    else:
        assert tail > 1e-6 * largest
    assert {path for path in gradients if is_dead(path, compatibility)} == (
        {path for path in gradients if path.startswith('tail_')} if compatibility == 'additive' else set()
    )


def test_leaving_the_tail_out_changes_nothing(images):
    model = SMALL()
    variables = draw_variables(model, images, train=False, full=True)
    full = jax.jit(functools.partial(model.apply, train=False, full=True))(variables, images)
    pruned = jax.jit(functools.partial(model.apply, train=False))(variables, images)
    tolerance = 1e-6 * np.abs(full.logits).max()
    np.testing.assert_allclose(pruned.logits, full.logits, atol=tolerance, rtol=0)


def test_training_leaves_the_dead_tail_alone(images):
    model = SMALL()
    variables = draw_variables(model, images, train=False, full=True)
    _, updates = jax.jit(functools.partial(model.apply, train=True, mutable=['batch_stats']))(variables, images)
    before, after = (flatten_dict(v['batch_stats'], sep='/') for v in (variables, updates))
    assert before.keys() == after.keys()
    for path, value in before.items():
        assert bool((value == after[path]).all()) == path.startswith('tail_'), path


def test_normalise_maps_bytes_to_minus_one_and_one():
    np.testing.assert_allclose(normalise(jnp.array([0, 255], jnp.uint8)), [-1, 1])


def test_unknown_combination(images):
    with pytest.raises(ValueError, match="'sum'"):
        init_shapes(SMALL(combination='sum'), 32)
