"""Evidence of a slice model: the share of each pixel in the logit of each class, for (positive) or against (negative).

The models compute the shares e_ic of the positions of each module's map (see `att2.Att2Outputs`). Here they are spread
over the pixels of the slice, so that sums are kept.

Shapes: N slices, S their side, K classes, h and w the sides of a feature map.
"""

import jax
import jax.numpy as jnp

from covidjax.data.lists import CLASSES


def spread(shares: jax.Array, size: int) -> jax.Array:
    """Upsamples shares [N, h, w, ...] to [N, size, size, ...], bilinearly, so that the sum of each map is kept.

    Bilinear interpolation with half-pixel centres gives position i the weight R_pi in pixel p. Each position's weights
    are divided by their sum over the pixels: E_p = sum over i of (R_pi / sum over q of R_qi) e_i.
    """
    weights = [jax.image.resize(jnp.eye(n, dtype=shares.dtype), (size, n), 'bilinear') for n in shares.shape[1:3]]
    rows, columns = (w / w.sum(0) for w in weights)
    return jnp.einsum('ph,qw,nhw...->npq...', rows, columns, shares)


def combine_evidence(evidence: tuple[jax.Array, jax.Array], size: int, combination: str) -> jax.Array:
    """Returns the shares of the pixels in the logits, [N, size, size, K].

    With 'concat' the maps of both modules add up: logit_c = bias_c + sum over the pixels of E_pc. With 'average' each
    module has logits of its own, and E is the mean of both maps: it adds up to the mean of both modules' logits less
    their biases.

    Args:
      evidence: of both modules, see `att2.Att2Outputs`.
      size: side of the slice in pixels.
      combination: of the model, one of `att2.COMBINATIONS`.
    """
    total = spread(evidence[0], size) + spread(evidence[1], size)
    return total if combination == 'concat' else total / 2


def subtract_pneumonia(evidence: jax.Array) -> jax.Array:
    """Returns the evidence for COVID-19 less that for pneumonia, from evidence [..., K]."""
    return evidence[..., CLASSES.index('covid19')] - evidence[..., CLASSES.index('pneumonia')]
