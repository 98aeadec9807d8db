"""The training step as a pure function; callers bind the keyword arguments and compile it once."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from covidjax.data.augment import AugmentOptions, augment
from covidjax.models.att2 import normalise
from covidjax.training.losses import weighted_cross_entropy
from covidjax.training.state import TrainState

# (variables, images in [-1, 1], batch) -> logits [B, K] and the new batch statistics.
Forward = Callable[[dict[str, Any], jax.Array, dict[str, jax.Array]], tuple[jax.Array, Any]]


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    forward: Forward,
    optimizer: optax.GradientTransformation,
    class_weights: Sequence[float],
    augmentation: AugmentOptions | None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augments a batch, makes one update and returns the new state and the batch's sums.

    Args:
      state: before the update.
      batch: 'image' uint8 [B, S, S, C] (C is 1 for slices, the number of slices for scans, which share one draw),
        'label' int32 [B], 'mask' float32 [B] (0 marks padding), and what else `forward` reads.
      forward: the model in training mode.
      optimizer: as the state was created with.
      class_weights: [K], see `losses.compute_class_weights`.
      augmentation: None trains on the images as they are.

    Returns:
      The state after the update, and scalars 'loss' (sum of weighted losses), 'weight' (sum of weights), 'correct' and
      'count'; the mean weighted loss is loss / weight.
    """
    images = batch['image']
    if augmentation is not None:
        keys_B = jax.random.split(jax.random.fold_in(state.key, state.step), len(images))
        unit = images.astype(jnp.float32) / 255
        images = 255 * jax.vmap(lambda key, image: augment(key, image, options=augmentation))(keys_B, unit)

    def compute_loss(params):
        variables = {'params': params, 'batch_stats': state.batch_stats}
        logits, batch_stats = forward(variables, normalise(images), batch)
        losses_B, weights_B = weighted_cross_entropy(logits, batch['label'], class_weights)
        mask_B = batch['mask']
        sums = {
            'loss': (losses_B * mask_B).sum(),
            'weight': (weights_B * mask_B).sum(),
            'correct': ((logits.argmax(-1) == batch['label']) * mask_B).sum(),
            'count': mask_B.sum(),
        }
        return sums['loss'] / sums['weight'], (sums, batch_stats)

    (_, (sums, batch_stats)), gradients = jax.value_and_grad(compute_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), sums
