"""The training step as a pure function; callers bind the keyword arguments and compile it once.

Shapes: B examples of the batch, or of one device's part of it under `jax.pmap`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from covidjax.models.att2 import normalise
from covidjax.models.lesions import PLANES, STRIDE
from covidjax.training.augment import Augmentation, augment
from covidjax.training.losses import Objective
from covidjax.training.state import TrainState

# (variables, images in [-1, 1] or embeddings, batch) -> outputs for the objective and the new batch statistics. Under
# `jax.pmap` the batch statistics are taken over all devices.
Forward = Callable[[dict[str, Any], jax.Array, dict[str, jax.Array]], tuple[Any, Any]]


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    forward: Forward,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    augmentation: Augmentation | None,
    dtype: str = 'float32',
    accumulation_steps: int = 1,
    axis_name: str | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Augments a batch, makes one update and returns the new state and the batch's sums.

    Weighted losses and weights are summed over devices and parts of a batch, then divided once, so the loss does not
    depend on the number of devices or on `accumulation_steps`. Batch normalisation does depend on the parts: it sees
    one at a time. Its running statistics move once, by the mean over the parts.

    Args:
      state: state before the update.
      batch: 'image' uint8 [B, S, S, C] (C is 1 for slices, the number of slices for scans, which share one draw),
        'mask' float32 [B] (0 marks padding), and further inputs of `forward` and of the objective. It may hold
        'embedding' [B, ...], computed from images before, instead of 'image'. 'masks' uint8 [B, S, S, 1], bit codes
        of outlines, become 'planes' (see `pool_masks`) and move with their image.
      forward: the model in training mode.
      optimizer: the optimizer that the state was created with.
      objective: the loss.
      augmentation: None uses the images unchanged.
      dtype: dtype of activations, and of the parameters that compute them; the stored parameters, batch statistics,
        softmax and loss keep their own.
      accumulation_steps: A, a divisor of B. Example b belongs to part b modulo A, so that the parts of a sharded batch
        are sharded too.
      axis_name: axis of `jax.pmap`; None if the step sees the whole batch.

    Returns:
      The state after the update, and scalars: 'loss' (sum of weighted losses), 'weight' (sum of weights), 'correct'
      (sum of scores), 'count' (number of examples), and 'gradient_norm', finite if and only if the update is. The mean
      weighted loss is loss / weight.
    """

    def add_up(tree):
        return tree if axis_name is None else jax.lax.psum(tree, axis_name)

    inputs = 'embedding' if 'embedding' in batch else 'image'
    keys_B = _split_key(jax.random.fold_in(state.key, state.step), len(batch[inputs]), axis_name)
    batch = {**batch, 'key': keys_B}
    if inputs == 'image':
        batch |= prepare_inputs(batch, keys_B, augmentation)
    weight = add_up((objective.weigh(batch) * batch['mask']).sum())

    def compute_loss(params, part):
        variables = {'params': cast(params, dtype), 'batch_stats': state.batch_stats}
        outputs, batch_stats = forward(variables, cast(part[inputs], dtype), part)
        losses_B, scores_B = objective.compute(outputs, part)
        mask_B = part['mask']
        sums = {
            'loss': (losses_B * mask_B).sum(),
            'weight': (objective.weigh(part) * mask_B).sum(),
            'correct': (scores_B * mask_B).sum(),
            'count': mask_B.sum(),
        }
        return sums['loss'] / weight, (sums, batch_stats)

    def compute_part(part):
        (_, (sums, batch_stats)), gradients = jax.value_and_grad(compute_loss, has_aux=True)(state.params, part)
        return gradients, sums, batch_stats

    gradients, sums, batch_stats = _accumulate(compute_part, batch, accumulation_steps)
    gradients, sums = add_up((gradients, sums))
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    sums['gradient_norm'] = optax.tree.norm(gradients)
    return state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state), sums


def prepare_inputs(
    batch: dict[str, jax.Array], keys_B: jax.Array | None, augmentation: Augmentation | None
) -> dict[str, jax.Array]:
    """Returns 'image' in [-1, 1], and 'planes' if the batch has 'masks', augmented with one key for each example."""
    if 'masks' not in batch:
        return {'image': prepare_images(batch['image'], keys_B, augmentation)}
    planes = pool_masks(batch['masks'])
    if augmentation is None:
        return {'image': normalise(batch['image']), 'planes': planes}
    unit = batch['image'].astype(jnp.float32) / 255
    images, planes = jax.vmap(functools.partial(augment, options=augmentation))(keys_B, unit, planes)
    return {'image': normalise(255 * images), 'planes': planes}


def prepare_images(images: jax.Array, keys_B: jax.Array | None, augmentation: Augmentation | None) -> jax.Array:
    """Returns uint8 images [B, S, S, C] in [-1, 1], augmented with one key each unless `augmentation` is None."""
    if augmentation is not None:
        unit = images.astype(jnp.float32) / 255
        images = 255 * jax.vmap(lambda key, image: augment(key, image, options=augmentation))(keys_B, unit)
    return normalise(images)


def pool_masks(bits_BxSxSx1: jax.Array) -> jax.Array:
    """Returns the share of each position that is outlined, float32 [B, S / 4, S / 4, 3] (see `lesions.PLANES`).

    Args:
      bits_BxSxSx1: uint8 bit codes: bit m is set where plane m is outlined.
    """
    b, height, width, _ = bits_BxSxSx1.shape
    planes = (bits_BxSxSx1 >> jnp.arange(len(PLANES), dtype=jnp.uint8).reshape(1, 1, 1, -1)) & 1
    blocks = planes.reshape(b, height // STRIDE, STRIDE, width // STRIDE, STRIDE, len(PLANES))
    return blocks.mean((2, 4), dtype=jnp.float32)


def cast(tree: Any, dtype: str) -> Any:
    """Casts float32 arrays to `dtype`; leaves others unchanged."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.dtype == jnp.float32 else leaf, tree)


def _split_key(key: jax.Array, num_examples: int, axis_name: str | None) -> jax.Array:
    """Returns one key per example of this device: the keys that these examples would get on a single device."""
    if axis_name is None:
        return jax.random.split(key, num_examples)
    keys = jax.random.split(key, num_examples * jax.lax.axis_size(axis_name))
    return jax.lax.dynamic_slice_in_dim(keys, jax.lax.axis_index(axis_name) * num_examples, num_examples)


def _accumulate(compute_part: Callable[[dict], tuple[Any, Any, Any]], batch: dict, num_parts: int) -> tuple:
    """Returns gradients and sums added over the parts of a batch, and the mean of their batch statistics."""
    if num_parts == 1:
        return compute_part(batch)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, num_parts, *x.shape[1:]), 1, 0), batch)
    shapes = jax.eval_shape(compute_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add_part(total, part):
        return jax.tree.map(jnp.add, total, compute_part(part)), None

    (gradients, sums, batch_stats), _ = jax.lax.scan(add_part, zeros, parts)
    return gradients, sums, jax.tree.map(lambda total: total / num_parts, batch_stats)
