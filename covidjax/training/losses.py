"""What training minimises: the paper's class-weighted cross-entropy, a term for attention, and the loss of outlines.

Shapes: B examples, K classes, h x h positions, M planes of outlines (see `lesions.PLANES`).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from covidjax.models.lesions import PLANES

Batch = dict[str, jax.Array]

_POSITIVE_WEIGHTS = (1.0, 2.0, 1.0)  # of lungs, lesion and consolidation
_CROSS_ENTROPY_WEIGHT = 3.0  # beside a Dice loss of weight 1


class Objective(NamedTuple):
    """A loss that is a weighted mean over examples.

    Attributes:
      weigh: batch -> weights float32 [B]. The mean loss is the sum of losses over the sum of weights.
      compute: (outputs of the model, batch) -> losses [B], multiplied by the weights, and scores [B] from 0 (wrong) to
        1 (right).
      score: name of the score.
    """

    weigh: Callable[[Batch], jax.Array]
    compute: Callable[[Any, Batch], tuple[jax.Array, jax.Array]]
    score: str


def compute_class_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Returns w_c = min(counts) / counts_c over the classes that have examples, 0 for the others.

    The rarest class weighs 1.

    Raises:
      ValueError: fewer than two classes have examples.
    """
    present = [count for count in counts if count > 0]
    if len(present) < 2:
        raise ValueError(f'at least two classes need examples in the training data, got counts {list(counts)}')
    return tuple(min(present) / count if count > 0 else 0.0 for count in counts)


def weighted_cross_entropy(
    logits_BxK: jax.Array, labels_B: jax.Array, class_weights: Sequence[float], label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns w_c * -log p_c [B] and w_c [B] per example; the loss of a set is sum of the first / sum of the second.

    Both have the dtype of the logits, but at least float32. The paper calls the loss "weighted binary cross-entropy";
    this is what its code computes. With `label_smoothing` e, -log p_c becomes (1 - e) * -log p_c + e * mean(-log p)
    over the classes whose weight is not 0 (Szegedy et al. 2016).
    """
    logits_BxK = jnp.asarray(logits_BxK)
    dtype = jnp.promote_types(logits_BxK.dtype, jnp.float32)
    logits_BxK = logits_BxK.astype(dtype)
    weights_B = jnp.asarray(class_weights, dtype)[labels_B]
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxK, labels_B)
    if label_smoothing:
        present = jnp.asarray(class_weights, dtype) > 0
        every_B = -jnp.where(present, jax.nn.log_softmax(logits_BxK), 0).sum(-1) / present.sum()
        nll_B = (1 - label_smoothing) * nll_B + label_smoothing * every_B
    return weights_B * nll_B, weights_B


def create_cross_entropy(class_weights: Sequence[float], label_smoothing: float = 0.0) -> Objective:
    """Returns the objective of classification: `weighted_cross_entropy`, scored by right or wrong calls."""

    def weigh(batch: Batch) -> jax.Array:
        return jnp.asarray(class_weights, jnp.float32)[batch['label']]

    def compute(logits_BxK: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        losses_B, _ = weighted_cross_entropy(logits_BxK, batch['label'], class_weights, label_smoothing)
        return losses_B, logits_BxK.argmax(-1) == batch['label']

    return Objective(weigh, compute, 'accuracy')


def compute_attention_losses(maps: Sequence[jax.Array], lesions_BxGxG: jax.Array) -> jax.Array:
    """Returns the mean over attention maps of the divergence KL(t || a) from the lesions [B]; 0 without a lesion.

    t is the share of lesion at each position, scaled to the sum 1: attention is best spread over all of the lesions and
    nowhere else.

    Args:
      maps: attention maps float [B, h, w], which sum to 1.
      lesions_BxGxG: share of lesion, float32 in [0, 1].
    """
    losses = []
    for attention_Bxhxw in maps:
        shares = jax.image.resize(lesions_BxGxG, attention_Bxhxw.shape, 'linear')  # averages, with antialiasing
        targets = shares / jnp.maximum(shares.sum((1, 2), keepdims=True), 1e-6)
        attention = jnp.maximum(attention_Bxhxw.astype(jnp.float32), 1e-8)
        entropies = jax.scipy.special.xlogy(targets, targets)  # 0 log 0 = 0
        losses.append((entropies - targets * jnp.log(attention)).sum((1, 2)))
    return sum(losses) / len(maps)


def add_attention_loss(objective: Objective, factor: float) -> Objective:
    """Adds factor * `compute_attention_losses` to the loss of each example, before it is weighted.

    The outputs become (outputs of the objective, attention maps); batches have 'planes' too (see `lesions.PLANES`).
    """

    def compute(outputs: tuple[jax.Array, Sequence[jax.Array]], batch: Batch) -> tuple[jax.Array, jax.Array]:
        losses_B, scores_B = objective.compute(outputs[0], batch)
        attention_B = compute_attention_losses(outputs[1], batch['planes'][..., PLANES.index('lesion')])
        return losses_B + factor * objective.weigh(batch) * attention_B, scores_B

    return objective._replace(compute=compute)


def compute_mask_losses(logits_BxhxhxM: jax.Array, targets_BxhxhxM: jax.Array, known_BxM: jax.Array) -> jax.Array:
    """Returns the loss of outlines [B]: over the known planes, the sum of 3 * cross-entropy + Dice loss.

    The cross-entropy is the mean over positions, -(w t log p + (1 - t) log(1 - p)), with w = 2 for lesions and 1
    elsewhere. The Dice loss is 1 - 2 sum(p t) / (sum(p) + sum(t)); it is left out where nothing is outlined. For
    consolidation, both are over the positions outlined as lesion, in proportion to their share of lesion.

    Args:
      logits_BxhxhxM: see `lesions.LesionNet`.
      targets_BxhxhxM: share of each position that is outlined, in [0, 1].
      known_BxM: 1 where the plane of an example is outlined, else 0.
    """
    logits, targets = jnp.asarray(logits_BxhxhxM, jnp.float32), jnp.asarray(targets_BxhxhxM, jnp.float32)
    lesion = targets[..., 1]
    shares = jnp.stack([jnp.ones_like(lesion), jnp.ones_like(lesion), lesion], axis=-1)
    # Consolidation is a part of the lesion: its share within the lesion.
    within = jnp.minimum(targets[..., 2] / jnp.maximum(lesion, 1e-6), 1)
    targets = targets.at[..., 2].set(within)
    positive = jnp.asarray(_POSITIVE_WEIGHTS).reshape(1, 1, 1, -1)
    crosses = -positive * targets * jax.nn.log_sigmoid(logits) - (1 - targets) * jax.nn.log_sigmoid(-logits)
    cross_BxM = (shares * crosses).sum((1, 2)) / jnp.maximum(shares.sum((1, 2)), 1e-6)
    p = jax.nn.sigmoid(logits)
    outlined_BxM = (shares * targets).sum((1, 2))
    overlap_BxM = 2 * (shares * p * targets).sum((1, 2))
    dice_BxM = 1 - overlap_BxM / ((shares * p).sum((1, 2)) + outlined_BxM + 1e-6)
    dice_BxM = jnp.where(outlined_BxM > 0, dice_BxM, 0)
    return (known_BxM * (_CROSS_ENTROPY_WEIGHT * cross_BxM + dice_BxM)).sum(-1)


def score_masks(logits_BxhxhxM: jax.Array, targets_BxhxhxM: jax.Array) -> jax.Array:
    """Returns the Dice coefficient [B] of the lesions at probability 0.5; 1 where neither side has any."""
    found, outlined = logits_BxhxhxM[..., 1] > 0, targets_BxhxhxM[..., 1] >= 0.5
    both, either = (found & outlined).sum((1, 2)), found.sum((1, 2)) + outlined.sum((1, 2))
    return jnp.where(either > 0, 2 * both / jnp.maximum(either, 1), 1.0)


def create_mask_objective() -> Objective:
    """Returns the objective of outlines; batches have 'planes' [B, h, h, M] and 'known' (bit m: plane m is known)."""

    def compute(logits_BxhxhxM: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        bits_1xM = (1 << jnp.arange(logits_BxhxhxM.shape[-1]))[None]
        known_BxM = (batch['known'].astype(jnp.int32)[:, None] & bits_1xM) > 0
        losses_B = compute_mask_losses(logits_BxhxhxM, batch['planes'], known_BxM)
        return losses_B, score_masks(logits_BxhxhxM, batch['planes'])

    return Objective(lambda batch: jnp.ones(len(batch['known'])), compute, 'dice')
