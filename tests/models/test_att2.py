import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.models.attention import COMPATIBILITIES, NEED_GLOBAL_FEATURE
from covidjax.training.losses import create_cross_entropy
from covidjax.training.optimizer import create_optimizer
from covidjax.training.state import create_train_state
from covidjax.training.step import train_step
from tests.variables import draw_variables

SMALL = functools.partial(Att2, stage_sizes=(1, 1, 1), width=8, block='basic', stem='small', tail_blocks=1)


IMAGES = np.random.default_rng(0).uniform(-1, 1, (2, 32, 32, 1)).astype(np.float32)


@pytest.fixture(scope='module')
def images():
    return IMAGES


@functools.cache
def compile_small(**options):
    """Returns variables and compiled evaluation of a small model. Compiling takes most of the time of a test."""
    model = SMALL(**options)
    variables = draw_variables(model, IMAGES, train=False, full=True)
    return variables, jax.jit(functools.partial(model.apply, train=False))


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
        'attention2': 2048,  # only u: the widths agree
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


@pytest.mark.parametrize('options', [*({'compatibility': c} for c in COMPATIBILITIES), {'combination': 'average'}])
def test_attention_sums_to_one(images, options):
    variables, evaluate = compile_small(**options)
    outputs = evaluate(variables, images)
    for attention in outputs.attention:
        np.testing.assert_allclose(attention.sum((1, 2)), 1, rtol=1e-5)
        assert (attention >= 0).all()
    assert np.isfinite(outputs.logits).all()


def test_average_is_the_mean_of_probabilities(images):
    variables, evaluate = compile_small(combination='average')
    outputs = evaluate(variables, images)
    contexts = outputs.embedding[:, :16], outputs.embedding[:, 16:]  # stage widths 16 and 32
    probabilities = []
    for i, context in enumerate(contexts):
        classifier = variables['params'][f'classifier{i + 1}']
        probabilities.append(jax.nn.softmax(context @ classifier['kernel'] + classifier['bias'][None]))
    np.testing.assert_allclose(jax.nn.softmax(outputs.logits), sum(probabilities) / 2, atol=1e-6)


def split_tail(tree):
    """Returns the arrays of the tail, and all other arrays, by path."""
    flat = flatten_dict(tree, sep='/')
    return tuple(
        {path: leaf for path, leaf in flat.items() if path.startswith('tail_') == want} for want in (True, False)
    )


def assert_independent_of_the_tail(model, images):
    """Checks that another tail gives the same logits and gradients, and that the tail gets no gradient."""
    variables = draw_variables(model, images, train=False, full=True)
    others = draw_variables(model, images, train=False, full=True, seed=1)
    changed = {
        **variables['params'],
        **{name: part for name, part in others['params'].items() if name.startswith('tail_')},
    }

    @jax.jit
    def differentiate(params, images):
        def compute_loss(params):
            logits = model.apply({**variables, 'params': params}, images, train=False, full=True).logits
            return (logits**2).sum(), logits

        return jax.grad(compute_loss, has_aux=True)(params)

    gradients, logits = differentiate(variables['params'], images)
    other_gradients, other_logits = differentiate(changed, images)
    np.testing.assert_allclose(other_logits, logits, atol=1e-5 * np.abs(logits).max(), rtol=0)
    dead, alive = split_tail(gradients)
    _, other_alive = split_tail(other_gradients)
    largest = max(np.abs(gradient).max() for gradient in alive.values())
    for path, gradient in alive.items():
        np.testing.assert_allclose(other_alive[path], gradient, atol=1e-5 * largest, rtol=0, err_msg=path)
    for path, gradient in dead.items():
        np.testing.assert_allclose(gradient, 0, atol=1e-6 * largest, err_msg=path)


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_nothing_depends_on_the_tail_unless_the_global_feature_is_needed(images, compatibility):
    model = SMALL(compatibility=compatibility)
    if compatibility in NEED_GLOBAL_FEATURE:
        with pytest.raises(AssertionError):
            assert_independent_of_the_tail(model, images)
    else:
        assert_independent_of_the_tail(model, images)


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_dead_parameters_are_those_of_the_tail(compatibility):
    _, variables = init_shapes(SMALL(compatibility=compatibility), 32)
    tail, _ = split_tail(variables['params'])
    dead = {path for path in flatten_dict(variables['params'], sep='/') if is_dead(path, compatibility)}
    assert dead == (set() if compatibility in NEED_GLOBAL_FEATURE else set(tail))


@pytest.mark.parametrize('compatibility', COMPATIBILITIES)
def test_dead_tail_is_not_computed(images, compatibility):
    variables, evaluate = compile_small(compatibility=compatibility)
    broken = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.full_like(leaf, np.nan) if path[1].key.startswith('tail_') else leaf, variables
    )
    logits = evaluate(broken, images).logits
    assert np.isnan(logits).any() == (compatibility in NEED_GLOBAL_FEATURE)


@pytest.mark.parametrize('compatibility', ['additive', 'tanh'])
def test_dead_tail_is_not_trained(compatibility):
    model = SMALL(compatibility=compatibility)
    optimizer = create_optimizer(
        optax.constant_schedule(0.1),
        weight_decay=0.5,
        decay='decoupled',
        is_frozen=functools.partial(is_dead, compatibility=compatibility),
    )
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)
    state = create_train_state(jax.tree.map(jnp.asarray, variables), optimizer, jax.random.key(0))

    def forward(variables, images, _):
        outputs, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return outputs.logits, updates['batch_stats']

    batch = {
        'image': np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1), dtype=np.uint8),
        'label': np.array([0, 2], np.int32),
        'mask': np.ones(2, np.float32),
    }
    step = functools.partial(
        train_step,
        forward=forward,
        optimizer=optimizer,
        objective=create_cross_entropy((1.0, 1.0, 1.0)),
        augmentation=None,
    )
    new, _ = jax.jit(step)(state, batch)
    for before, after in ((variables['params'], new.params), (variables['batch_stats'], new.batch_stats)):
        for path, leaf in flatten_dict(before, sep='/').items():
            is_still = np.array_equal(leaf, flatten_dict(after, sep='/')[path])
            assert is_still == is_dead(path, compatibility), path
    # The optimizer keeps no moments for the tail.
    trained = [leaf for path, leaf in flatten_dict(new.params, sep='/').items() if not is_dead(path, compatibility)]
    moments = [leaf for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in moments) == 2 * sum(leaf.size for leaf in trained)


@pytest.mark.parametrize('compatibility', ['additive', 'uniform'])
def test_leaving_the_tail_out_changes_nothing(images, compatibility):
    variables, evaluate = compile_small(compatibility=compatibility)
    model = SMALL(compatibility=compatibility)
    full = jax.jit(functools.partial(model.apply, train=False, full=True))(variables, images)
    pruned = evaluate(variables, images)
    for name, tolerance in (('logits', 1e-6), ('embedding', 1e-5), ('attention', 1e-5)):
        for found, expected in zip(*(jax.tree.leaves(getattr(o, name)) for o in (pruned, full)), strict=True):
            np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


LIGHT = functools.partial(Att2, backbone='efficientnet_lite0')


def test_parameters_and_shapes_of_the_light_model():
    outputs, variables = init_shapes(LIGHT())
    assert count_by_part(variables['params']) == {
        'backbone': 3_371_008,
        'attention1': 112 * 1280 + 1280,  # W_p and u
        'attention2': 1280,
        'classifier': 1392 * 3 + 3,
    }
    assert outputs.embedding.shape == (2, 1392)
    assert [a.shape for a in outputs.attention] == [(2, 14, 14), (2, 7, 7)]


@pytest.mark.parametrize('model', [Att2(), SMALL(), LIGHT(), LIGHT(combination='average')])
def test_the_embedding_is_as_wide_as_both_local_features(model):
    outputs, _ = init_shapes(model, 32)
    assert outputs.embedding.shape[-1] == sum(model.local_features())


def test_the_global_feature_of_the_light_model_is_the_average_of_its_last_features():
    model, image = LIGHT(compatibility='dot'), np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 1)).astype('f')
    variables = draw_variables(model, image, train=False)
    apply = jax.jit(
        functools.partial(model.apply, train=False, capture_intermediates=True),
        compiler_options={'xla_backend_optimization_level': 0},
    )
    outputs, state = apply(variables, image)
    x = state['intermediates']['backbone']['__call__'][0][-1].reshape(4, 1280)
    np.testing.assert_allclose(outputs.attention[1].ravel(), jax.nn.softmax(x @ x.mean(0)), rtol=1e-3)


def test_dropout_leaves_out_its_share_by_the_key_of_each_example(images):
    model = SMALL(dropout=0.25)
    variables = draw_variables(model, images, train=False, full=True)
    weights = variables['params']['classifier']['kernel']

    @jax.jit
    def differentiate(keys_B):
        def compute(kernel):
            params = {**variables['params'], 'classifier': {**variables['params']['classifier'], 'kernel': kernel}}
            outputs, _ = model.apply(
                {**variables, 'params': params}, images, train=True, dropout_keys_B=keys_B, mutable=['batch_stats']
            )
            return outputs.logits[:, 0], outputs.embedding

        return jax.jacrev(compute, has_aux=True)(weights)

    keys_B = jax.random.split(jax.random.key(0), len(images))
    jacobian, embedding = differentiate(keys_B)
    kept = jacobian[:, :, 0]  # what the classifier reads
    share = (kept != 0).mean()
    assert 0.55 < share < 0.95
    np.testing.assert_allclose(kept, np.where(kept != 0, embedding / 0.75, 0), rtol=1e-5)
    swapped, _ = differentiate(keys_B[::-1])
    np.testing.assert_array_equal(swapped[::-1, :, 0] != 0, kept != 0)


def test_dropout_needs_keys_in_training_and_only_there(images):
    keys_B = jax.random.split(jax.random.key(0), len(images))
    for dropout, train, keys in ((0.25, True, None), (0.25, False, keys_B), (0.0, True, keys_B)):
        with pytest.raises(ValueError, match='dropout keys'):
            SMALL(dropout=dropout).init(jax.random.key(0), images, train=train, dropout_keys_B=keys)


@pytest.mark.parametrize('options', [*({'compatibility': c} for c in COMPATIBILITIES), {'mirror': True}])
def test_evidence_of_both_modules_adds_up_to_the_logits(images, options):
    variables, evaluate = compile_small(**options)
    outputs = evaluate(variables, images)
    sums = sum(np.asarray(of_module).sum((1, 2)) for of_module in outputs.evidence)
    np.testing.assert_allclose(sums + variables['params']['classifier']['bias'], outputs.logits, atol=1e-5)
    assert min(of_module.min() for of_module in outputs.evidence) < 0  # signed


@pytest.mark.parametrize('options', [{}, {'mirror': True}])
def test_evidence_of_each_module_adds_up_to_its_own_logits(images, options):
    variables, evaluate = compile_small(combination='average', **options)
    outputs = evaluate(variables, images)
    logits = [
        np.asarray(of_module).sum((1, 2)) + variables['params'][f'classifier{i + 1}']['bias']
        for i, of_module in enumerate(outputs.evidence)
    ]
    probabilities = sum(jax.nn.softmax(of_module) for of_module in logits) / 2
    np.testing.assert_allclose(jax.nn.softmax(outputs.logits), probabilities, atol=1e-5)


def test_evidence_of_the_light_model_adds_up_to_the_logits():
    model, image = LIGHT(mirror=True), np.random.default_rng(0).uniform(-1, 1, (1, 64, 64, 1)).astype('f')
    variables = draw_variables(model, image, train=False)
    apply = jax.jit(functools.partial(model.apply, train=False), compiler_options={'xla_backend_optimization_level': 0})
    outputs = apply(variables, image)
    assert [of_module.shape for of_module in outputs.evidence] == [(1, 4, 4, 3), (1, 2, 2, 3)]
    sums = (
        sum(np.asarray(of_module).sum((1, 2)) for of_module in outputs.evidence)
        + variables['params']['classifier']['bias']
    )
    np.testing.assert_allclose(sums, outputs.logits, atol=1e-5 * max(1, np.abs(outputs.logits).max()))


def test_normalise_maps_bytes_to_minus_one_and_one():
    np.testing.assert_allclose(normalise(jnp.array([0, 255], jnp.uint8)), [-1, 1])


def test_unknown_backbone(images):
    with pytest.raises(ValueError, match="'vgg'"):
        init_shapes(SMALL(backbone='vgg'), 32)


def test_unknown_combination(images):
    with pytest.raises(ValueError, match="'sum'"):
        init_shapes(SMALL(combination='sum'), 32)


@pytest.mark.parametrize('combination', ['concat', 'average'])
def test_mirrored_evaluation_averages_a_slice_and_its_mirror_image(combination):
    model = Att2((1, 1), width=4, block='basic', stem='small', tail_blocks=1, combination=combination)
    images = jax.random.uniform(jax.random.key(3), (2, 32, 32, 1), minval=-1)
    variables = draw_variables(model, images, train=False, full=True)
    evaluate, evaluate_both = (
        jax.jit(functools.partial(m.apply, train=False)) for m in (model, model.clone(mirror=True))
    )
    both = evaluate_both(variables, images)
    one, other = (evaluate(variables, x) for x in (images, images[:, :, ::-1]))
    np.testing.assert_allclose(both.embedding, (one.embedding + other.embedding) / 2, atol=1e-6)
    for mean, a, b in zip(both.attention, one.attention, other.attention, strict=True):
        np.testing.assert_allclose(mean, (a + b[:, :, ::-1]) / 2, atol=1e-6)
    if combination == 'concat':
        np.testing.assert_allclose(both.logits, (one.logits + other.logits) / 2, atol=1e-5)
    # A slice and its mirror image get the same logits.
    mirrored = evaluate_both(variables, images[:, :, ::-1])
    np.testing.assert_allclose(mirrored.logits, both.logits, atol=1e-5)
