"""The paper's loss: class-weighted cross-entropy."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def compute_class_weights(counts: Sequence[int]) -> tuple[float, ...]:
    """Returns w_c = min(counts) / counts_c; the rarest class gets weight 1.

    Raises:
      ValueError: a class has no examples.
    """
    if min(counts) < 1:
        raise ValueError(f'every class needs examples in the training data, got counts {list(counts)}')
    return tuple(min(counts) / count for count in counts)


def weighted_cross_entropy(
    logits_BxK: jax.Array, labels_B: jax.Array, class_weights: Sequence[float]
) -> tuple[jax.Array, jax.Array]:
    """Returns w_c * -log p_c [B] and w_c [B] per example; the loss of a set is sum of the first / sum of the second.

    Both have the dtype of the logits, but at least float32. The paper calls the loss "weighted binary cross-entropy";
    this is what its code computes.
    """
    logits_BxK = jnp.asarray(logits_BxK)
    dtype = jnp.promote_types(logits_BxK.dtype, jnp.float32)
    weights_B = jnp.asarray(class_weights, dtype)[labels_B]
    nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_BxK.astype(dtype), labels_B)
    return weights_B * nll_B, weights_B
