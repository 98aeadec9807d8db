"""Two vectors in place of a feature map: the mean and the maximum of every channel over its positions.

They take a hundredth of the map's memory. Attention then chooses between the two, and what it gives to them is spread
over the positions that they come from.

Shapes: B batch, N positions, C channels, K classes.
"""

import jax
import jax.numpy as jnp


def pool(x_BxNxC: jax.Array) -> jax.Array:
    """Returns mean and maximum over the positions, [B, 2, C]."""
    return jnp.stack([x_BxNxC.mean(1), x_BxNxC.max(1)], axis=1)


def spread_attention(attention_Bx2: jax.Array, x_BxNxC: jax.Array) -> jax.Array:
    """Returns the attention of every position [B, N], with the same sum.

    That of the mean is spread evenly, that of the maximum by the share of channels whose (first) maximum is there.
    """
    n = x_BxNxC.shape[1]
    share_BxN = _find_maxima(x_BxNxC).mean(2)
    return attention_Bx2[:, :1] / n + attention_Bx2[:, 1:] * share_BxN


def spread_evidence(attention_Bx2: jax.Array, x_BxNxC: jax.Array, kernel_CxK: jax.Array) -> jax.Array:
    """Returns the share of every position in <w_k, context>, [B, N, K]; the shares add up to it.

    Args:
      attention_Bx2: of mean and maximum; the context vector is their weighted sum.
      x_BxNxC: the map.
      kernel_CxK: w, part of a linear classifier.
    """
    n = x_BxNxC.shape[1]
    of_mean, of_maximum = attention_Bx2[:, 0, None, None], attention_Bx2[:, 1, None, None]
    return of_mean * (x_BxNxC @ kernel_CxK) / n + of_maximum * ((_find_maxima(x_BxNxC) * x_BxNxC) @ kernel_CxK)


def _find_maxima(x_BxNxC: jax.Array) -> jax.Array:
    """Returns 1 at the first maximum of every channel and 0 elsewhere, [B, N, C]."""
    return jax.nn.one_hot(x_BxNxC.argmax(1), x_BxNxC.shape[1], axis=1, dtype=x_BxNxC.dtype)
