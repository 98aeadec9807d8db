"""The paper's loss: class-weighted cross-entropy."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


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
