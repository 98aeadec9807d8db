import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from covidjax.data.augment import AugmentOptions
from covidjax.models.seq import is_extractor
from covidjax.training.optim import create_optimizer
from covidjax.training.state import create_train_state
from covidjax.training.step import train_step


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


def make(optimizer, augmentation=None):
    params = MODEL.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))['params']
    state = create_train_state({'params': params, 'batch_stats': {}}, optimizer, jax.random.key(1))
    step = jax.jit(
        functools.partial(
            train_step, forward=forward, optimizer=optimizer, class_weights=WEIGHTS, augmentation=augmentation
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
    state, step = make(optax.sgd(0.0), AugmentOptions())  # nothing moves: losses differ by the draw alone
    after_one, first = step(state, batch)
    _, second = step(after_one, batch)
    _, again = step(state, batch)
    assert float(first['loss']) == float(again['loss'])
    assert float(first['loss']) != float(second['loss'])


def test_root_key_is_never_replaced(batch):
    state, step = make(optax.sgd(0.1), AugmentOptions())
    new, _ = step(state, batch)
    np.testing.assert_array_equal(jax.random.key_data(new.key), jax.random.key_data(state.key))
