import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covidjax.data.sequences import pad_length
from covidjax.models.att2 import Att2
from covidjax.models.seq import HEADS, GatedClassifier, Seq, SequenceClassifier, is_extractor, masked_softmax
from covidjax.training.augment import AugmentOptions
from covidjax.training.losses import create_cross_entropy
from covidjax.training.optimizer import create_optimizer
from covidjax.training.state import create_train_state
from covidjax.training.step import train_step
from tests.variables import draw_variables

EMBEDDING, HIDDEN = 5, 4


@pytest.fixture(scope='module')
def classifier():
    model = SequenceClassifier(HIDDEN, 3)
    x = jax.random.normal(jax.random.key(0), (2, 6, EMBEDDING))
    return model, draw_variables(model, x, jnp.array([6, 6])), x


@pytest.fixture(scope='module')
def scan_model():
    extractor = Att2(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1)
    model = Seq(extractor, hidden=HIDDEN)
    images = jax.random.normal(jax.random.key(2), (2, 16, 16, 5))
    lengths = jnp.array([5, 3])
    return model, draw_variables(model, images, lengths), images, lengths


def transcribe(params, x, length):
    """Computes equations (1) to (6) and (13) to (17), with a tanh candidate, for one sequence [T, E]."""
    x = np.asarray(x[:length], np.float64)
    params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def sigmoid(z):
        return 1 / (1 + np.exp(-z))

    def run(cell, inputs):
        h = s = np.zeros(HIDDEN)
        states = []
        for x_t in inputs:
            z = {k: x_t @ cell[f'i{k}']['kernel'] + h @ cell[f'h{k}']['kernel'] + cell[f'h{k}']['bias'] for k in 'ifgo'}
            s = sigmoid(z['f']) * s + sigmoid(z['i']) * np.tanh(z['g'])
            h = np.tanh(s) * sigmoid(z['o'])
            states.append(h)
        return states

    forward, backward = run(params['forward'], x), run(params['backward'], x[::-1])[::-1]
    h = np.array([np.concatenate(pair) for pair in zip(forward, backward, strict=True)])
    attention = params['attention']
    g = np.tanh(h[-1] @ attention['W_g']['kernel'] + attention['W_g']['bias'])
    scores = np.array([g @ (h_i @ attention['W_s']['kernel']) for h_i in h])
    a = np.exp(scores) / np.exp(scores).sum()
    return a @ h @ params['classifier']['kernel'] + params['classifier']['bias'], a


@pytest.mark.parametrize('length', [1, 4, 6])
def test_equations(classifier, length):
    model, variables, x = classifier
    logits, attention, _ = jax.jit(model.apply)(variables, x, jnp.array([length, length]))
    for b in range(2):
        expected_logits, expected_attention = transcribe(variables['params'], x[b], length)
        np.testing.assert_allclose(logits[b], expected_logits, atol=1e-5)
        np.testing.assert_allclose(attention[b, :length], expected_attention, atol=1e-5)
        assert (attention[b, length:] == 0).all()


def test_padding_never_changes_the_output(classifier):
    model, variables, x = classifier
    lengths = jnp.array([2, 5])
    apply = jax.jit(model.apply)
    logits, attention, _ = apply(variables, x, lengths)
    for junk in (0.0, 1e3):
        padded = x.at[0, 2:].set(junk).at[1, 5:].set(junk)
        other_logits, other_attention, _ = apply(variables, padded, lengths)
        np.testing.assert_array_equal(other_logits, logits)
        np.testing.assert_array_equal(other_attention, attention)
    longer = jnp.concatenate([x, jnp.ones((2, 10, EMBEDDING))], axis=1)
    np.testing.assert_allclose(apply(variables, longer, lengths)[0], logits, atol=1e-6)


@pytest.mark.parametrize('head', HEADS)
def test_shares_of_the_slices_add_up_to_the_logits_of_the_scan(head):
    model = HEADS[head](HIDDEN, 3)
    x, lengths = jax.random.normal(jax.random.key(0), (2, 6, EMBEDDING)), jnp.array([6, 4])
    variables = draw_variables(model, x, lengths)
    outputs = jax.jit(model.apply)(variables, x, lengths)
    bias = variables['params']['classifier']['bias']
    np.testing.assert_allclose(np.asarray(outputs.evidence).sum(1) + bias, outputs.logits, atol=1e-5)
    assert (outputs.evidence[1, 4:] == 0).all()


def test_parameters_of_the_papers_sequence_part():
    variables = jax.eval_shape(
        lambda key: SequenceClassifier().init(key, jnp.zeros((1, 16, 3072)), jnp.array([16])), jax.random.key(0)
    )
    count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(variables))
    lstm = 2 * 4 * (3072 * 128 + 128 * 128 + 128)  # one bias per gate
    assert count == lstm + (256 * 256 + 256) + 256 * 256 + (256 * 3 + 3)


def test_masked_softmax():
    scores, mask = jnp.array([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]]), jnp.array([[True, True, False], [False, True, False]])
    e = np.e
    np.testing.assert_allclose(masked_softmax(scores, mask), [[1 / (1 + e), e / (1 + e), 0], [0, 1, 0]], atol=1e-6)


def test_slices_are_classified_as_by_the_extractor_alone(scan_model):
    model, variables, images, lengths = scan_model
    outputs = jax.jit(model.apply)(variables, images, lengths)
    alone = {name: variables[name]['extractor'] for name in ('params', 'batch_stats')}
    evaluate = jax.jit(functools.partial(model.extractor.apply, train=False))
    expected = evaluate(alone, images[1, :, :, 2][None, :, :, None]).logits[0]
    np.testing.assert_allclose(outputs.slice_logits[1, 2], expected, atol=1e-6)
    assert outputs.attention.shape == (2, 5)
    assert (outputs.attention[1, 3:] == 0).all()


def test_order_of_slices_matters(scan_model):
    model, variables, images, lengths = scan_model
    apply = jax.jit(model.apply)
    forward = apply(variables, images, lengths).logits[0]
    backward = apply(variables, images[..., ::-1], lengths).logits[0]
    assert np.abs(forward - backward).max() > 1e-4


def test_no_gradient_reaches_the_extractor(scan_model):
    model, variables, images, lengths = scan_model

    def compute_loss(params, images):
        return (model.apply({**variables, 'params': params}, images, lengths).logits ** 2).sum()

    gradients = jax.jit(jax.grad(compute_loss))(variables['params'], images)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients['extractor']))
    assert any((leaf != 0).any() for leaf in jax.tree.leaves(gradients['sequence']))


def test_is_extractor(scan_model):
    paths = [
        jax.tree_util.keystr(path, simple=True, separator='/')
        for path, _ in jax.tree_util.tree_leaves_with_path(scan_model[1]['params'])
    ]
    assert {path.split('/')[0] for path in paths if is_extractor(path)} == {'extractor'}
    assert {path.split('/')[0] for path in paths if not is_extractor(path)} == {'sequence'}


@pytest.mark.parametrize('length', [1, 16, 418])
def test_scans_of_any_length(length):
    model = Seq(Att2(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1), hidden=HIDDEN)
    images = np.zeros((2, 16, 16, pad_length(length)), np.float32)
    images[..., :length] = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, length))
    lengths = jnp.array([length, 1])
    variables = draw_variables(model, images[..., :1], jnp.array([1, 1]))
    outputs = jax.jit(model.apply)(variables, images, lengths)
    assert np.isfinite(outputs.logits).all()
    np.testing.assert_allclose(outputs.attention.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal((outputs.attention > 0).sum(1), lengths)


def test_training_with_decay_leaves_the_extractor_bit_identical(scan_model):
    model, variables, _, lengths = scan_model
    optimizer = create_optimizer(
        optax.constant_schedule(0.1), weight_decay=0.5, decay='decoupled', is_frozen=is_extractor
    )
    state = create_train_state(jax.tree.map(jnp.asarray, variables), optimizer, jax.random.key(0))
    rng = np.random.default_rng(0)
    batch = {
        'image': rng.integers(0, 256, (2, 16, 16, 5), dtype=np.uint8),
        'length': lengths,
        'label': np.array([0, 2], np.int32),
        'mask': np.ones(2, np.float32),
    }

    def forward(variables, images, batch):
        return model.apply(variables, images, batch['length']).logits, variables['batch_stats']

    step = jax.jit(
        functools.partial(
            train_step,
            forward=forward,
            optimizer=optimizer,
            objective=create_cross_entropy((1.0, 1.0, 1.0)),
            augmentation=AugmentOptions(),
        )
    )
    new = step(step(state, batch)[0], batch)[0]
    jax.tree.map(np.testing.assert_array_equal, new.params['extractor'], variables['params']['extractor'])
    jax.tree.map(np.testing.assert_array_equal, new.batch_stats, variables['batch_stats'])
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), new.params['sequence'], variables['params']['sequence'])
    assert all(jax.tree.leaves(moved))
    # The extractor has no moments: all moments belong to the sequence part.
    num_moments = sum(leaf.size for leaf in jax.tree.leaves(new.opt_state) if leaf.ndim)
    assert num_moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(variables['params']['sequence']))


def test_gated_attention_by_hand_and_blind_to_padding_and_order():
    model = GatedClassifier(HIDDEN, 3)
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 6, EMBEDDING)))
    variables = draw_variables(model, x, jnp.array([6]))
    logits, attention, evidence = model.apply(variables, x, jnp.array([4]))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), variables['params'])
    rows = x[0, :4]
    signal = np.tanh(rows @ p['V']['kernel'] + p['V']['bias'])
    gate = 1 / (1 + np.exp(-(rows @ p['U']['kernel'] + p['U']['bias'])))
    scores = ((signal * gate) @ p['w']['kernel'])[:, 0]
    a = np.exp(scores) / np.exp(scores).sum()
    np.testing.assert_allclose(attention[0], [*a, 0, 0], atol=1e-6)
    expected = (a @ rows) @ p['classifier']['kernel'] + p['classifier']['bias']
    np.testing.assert_allclose(logits[0], expected, atol=1e-5)

    other = x.copy()
    other[0, 4:] = np.nan
    other[0, :4] = x[0, [2, 0, 3, 1]]
    np.testing.assert_allclose(evidence[0, :4], a[:, None] * (rows @ p['classifier']['kernel']), atol=1e-5)
    assert (evidence[0, 4:] == 0).all()
    logits_2, attention_2, evidence_2 = model.apply(variables, other, jnp.array([4]))
    np.testing.assert_allclose(evidence_2[0, :4], evidence[0, [2, 0, 3, 1]], atol=1e-5)
    np.testing.assert_allclose(logits_2, logits, atol=1e-6)
    np.testing.assert_allclose(attention_2[0, :4], a[[2, 0, 3, 1]], atol=1e-6)
