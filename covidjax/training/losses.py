"""The paper's loss: cross-entropy weighted by class."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def compute_class_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Returns w_c = min(counts) / counts_c, so that the rarest class weighs 1.

    Raises:
      ValueError: a class has no examples.
    """
    if min(counts) < 1:
        raise ValueError(f'every class needs examples in the training data, got counts {list(counts)}')
    return tuple(min(counts) / count for count in counts)


def weighted_cross_entropy(
    logits_BxK: jax.Array, labels_B: jax.Array, class_weights: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Returns per example w_c * -log p_c [B] and w_c [B]; the loss of a set is the quotient of their sums.

    The paper calls it "weighted binary cross-entropy"; its code computes this.
    """
    weights_B = jnp.asarray(class_weights, jnp.float32)[labels_B]
    logits_BxK = logits_BxK.astype(jnp.promote_types(logits_BxK.dtype, jnp.float32))
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxK, labels_B)
    return weights_B * nll_B, weights_B
