import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covidjax.models.att2 import Att2
from covidjax.models.seq import is_extractor
from covidjax.training.augment import AugmentOptions
from covidjax.training.losses import create_cross_entropy
from covidjax.training.optimizer import create_optimizer
from covidjax.training.state import create_train_state
from covidjax.training.step import pool_masks, train_step
from tests.variables import draw_variables


class Linear(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(3, name='extractor')(images.reshape(len(images), -1)) + self.param(
            'bias', nn.initializers.zeros, (1, 3)
        )


MODEL = Linear()
WEIGHTS = (0.5, 1.0, 0.25)


def forward(variables, images, batch):
    return MODEL.apply({'params': variables['params']}, images), variables['batch_stats']


def make(optimizer, augmentation=None, **options):
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))['params']
    state = create_train_state({'params': params, 'batch_stats': {}}, optimizer, jax.random.key(1))
    step = jax.jit(
        functools.partial(
            train_step,
            forward=forward,
            optimizer=optimizer,
            objective=create_cross_entropy(WEIGHTS),
            augmentation=augmentation,
            **options,
        )
    )
    return state, step


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    return {
        'image': rng.integers(0, 256, (4, 4, 4, 1), dtype=np.uint8),
        'label': np.array([0, 1, 2, 1], np.int32),
        'mask': np.ones(4, np.float32),
    }


def test_update_is_the_gradient_of_the_weighted_mean(batch):
    state, step = make(optax.sgd(0.1))
    new, sums = step(state, batch)

    def compute_loss(params):
        logits = MODEL.apply({'params': params}, batch['image'] / 127.5 - 1)
        nll = -jax.nn.log_softmax(logits)[np.arange(4), batch['label']]
        w = jnp.array([0.5, 1.0, 0.25, 1.0])
        return (w * nll).sum() / 2.75

    loss, gradients = jax.value_and_grad(compute_loss)(state.params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), new.params, expected)
    assert float(sums['loss'] / sums['weight']) == pytest.approx(float(loss), rel=1e-5)
    assert float(sums['weight']) == 2.75
    assert int(sums['count']) == 4
    assert int(new.step) == 1


def test_masked_examples_take_no_part(batch):
    state, step = make(optax.sgd(0.1))
    batch['mask'][3] = 0
    new, sums = step(state, batch)
    batch['image'][3], batch['label'][3] = 255, 0
    other, other_sums = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, (new.params, sums), (other.params, other_sums))
    assert int(sums['count']) == 3


def test_frozen_parameters_are_bit_identical_under_decay(batch):
    optimizer = create_optimizer(
        optax.constant_schedule(0.1), weight_decay=0.5, decay='decoupled', is_frozen=is_extractor
    )
    state, step = make(optimizer)
    new, _ = step(step(state, batch)[0], batch)
    jax.tree.map(np.testing.assert_array_equal, new.params['extractor'], state.params['extractor'])
    assert not np.array_equal(new.params['bias'], state.params['bias'])


def test_augmentation_is_new_in_every_step_and_repeatable(batch):
    state, step = make(optax.sgd(0.0), AugmentOptions())  # parameters do not move: losses differ only by the draw
    after_one, first = step(state, batch)
    _, second = step(after_one, batch)
    _, again = step(state, batch)
    assert float(first['loss']) == float(again['loss'])
    assert float(first['loss']) != float(second['loss'])


def test_root_key_is_never_replaced(batch):
    state, step = make(optax.sgd(0.1), AugmentOptions())
    new, _ = step(state, batch)
    np.testing.assert_array_equal(jax.random.key_data(new.key), jax.random.key_data(state.key))


def test_parts_of_a_batch_add_up_to_the_whole(batch):
    batch['mask'][2] = 0  # gives the parts different weights
    state, step = make(optax.adam(0.1), AugmentOptions())
    _, in_parts = make(optax.adam(0.1), AugmentOptions(), accumulation_steps=2)
    (new, sums), (other, other_sums) = step(state, batch), in_parts(state, batch)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), other_sums, sums)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), other.params, new.params)


@pytest.fixture(scope='module')
def slices():
    rng = np.random.default_rng(1)
    return {
        'image': rng.integers(0, 256, (8, 4, 4, 1), dtype=np.uint8).repeat(8, 1).repeat(8, 2),
        'label': np.array([0, 1, 2, 1, 0, 0, 2, 1], np.int32),
        'mask': np.ones(8, np.float32),
    }


@pytest.fixture(scope='module')
def slice_model(slices):
    """Returns a function (options) -> (state, compiled step) for a small model with batch normalisation."""
    model = Att2(stage_sizes=(1, 1), width=4, block='basic', stem='small', tail_blocks=1)
    variables = draw_variables(model, jnp.zeros((1, 32, 32, 1)), train=False, full=True)
    optimizer = optax.adam(1e-3)

    def forward(variables, images, batch):
        outputs, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
        return outputs.logits, updates['batch_stats']

    def make(**options):
        step = functools.partial(
            train_step,
            forward=forward,
            optimizer=optimizer,
            objective=create_cross_entropy(WEIGHTS),
            augmentation=None,
            **options,
        )
        # Less optimisation halves the compile time.
        compiled = jax.jit(step, compiler_options={'xla_backend_optimization_level': 0})
        return create_train_state(variables, optimizer, jax.random.key(1)), compiled

    return make


def run_steps(state, step, batch, count=5):
    losses = []
    for _ in range(count):
        state, sums = step(state, batch)
        losses.append(float(sums['loss'] / sums['weight']))
    return state, np.array(losses)


def test_running_statistics_move_by_the_mean_over_the_parts(slices, slice_model):
    state, step = slice_model()
    _, in_parts = slice_model(accumulation_steps=2)
    new, _ = in_parts(state, slices)
    # Example b belongs to part b modulo 2.
    parts = [step(state, {name: x[p::2] for name, x in slices.items()})[0] for p in range(2)]
    jax.tree.map(
        lambda mean, one, other: np.testing.assert_allclose(mean, (one + other) / 2, atol=1e-6),
        new.batch_stats['backbone'],
        *(part.batch_stats['backbone'] for part in parts),
    )


def test_bfloat16_computes_in_it_and_keeps_the_rest(slices, slice_model):
    state, step = slice_model()
    _, in_bfloat16 = slice_model(dtype='bfloat16')
    _, losses = run_steps(state, step, slices)
    end, rounded = run_steps(state, in_bfloat16, slices)
    np.testing.assert_allclose(rounded, losses, rtol=0.02)
    assert not np.array_equal(rounded, losses)
    assert {leaf.dtype for leaf in jax.tree.leaves((end.params, end.batch_stats))} == {np.dtype('float32')}
    program = str(in_bfloat16.trace(state, slices).jaxpr)
    products = re.findall(r':(\w+)\[[\d,]*\] = (?:conv_general_dilated|dot_general)', program)
    assert products.count('bf16') >= 15, products  # forward and backward through 5 convolutions


def test_masks_are_pooled_by_plane():
    bits = np.zeros((1, 8, 8, 1), np.uint8)
    bits[0, :4, :4] = 1  # lungs
    bits[0, :2, :4] |= 2  # half of a position is lesion
    bits[0, 0, :4] |= 4
    planes = np.asarray(pool_masks(bits))
    np.testing.assert_array_equal(planes[0, 0, 0], [1, 0.5, 0.25])
    assert planes.sum() == 1.75
