"""Evidence of a slice model: the share of each position or pixel in the logit of each class, for (+) or against (-).

The models compute the shares e_ic of the positions of each module's map (see `att2.Att2Outputs`). The softmax does not
change if the same number is added to all logits, so compare classes: the evidence of one class less that of another.

Shapes: N slices, S their side, K classes, h and w the sides of a feature map.
"""

import jax
import jax.numpy as jnp
import numpy as np

from covidjax.data.lists import CLASSES

NORMAL, PNEUMONIA, COVID = (CLASSES.index(name) for name in ('normal', 'pneumonia', 'covid19'))


def spread(shares: jax.Array, size: int) -> jax.Array:
    """Upsamples shares [N, h, w, K] to [N, size, size, K], bilinearly, so that the sum of each map is kept.

    Bilinear interpolation with half-pixel centres gives position i the weight R_pi in pixel p. The weights of each
    position are divided by their sum over the pixels: E_p = sum over i of R_pi / (sum over q of R_qi) * e_i.
    """
    weights = [jax.image.resize(jnp.eye(n, dtype=shares.dtype), (size, n), 'bilinear') for n in shares.shape[1:3]]
    rows, columns = (w / w.sum(0, keepdims=True) for w in weights)
    return jnp.einsum('qw,npwk->npqk', columns, jnp.einsum('ph,nhwk->npwk', rows, shares))


def combine_evidence(evidence: tuple[jax.Array, jax.Array], size: int, combination: str) -> jax.Array:
    """Returns the share of each pixel in the logits, [N, size, size, K].

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


def remove_attention(evidence: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """Returns <w_c, x_i> [N, h, w, K]: the evidence of one module before attention weights it, 0 where a_i is 0."""
    weights = attention[..., np.newaxis]
    return np.divide(evidence, weights, out=np.zeros_like(evidence), where=weights > 0)


def contrast(evidence: np.ndarray, called_N: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the class comparisons of evidence [N, ..., K], by name.

    Args:
      evidence: shares in the logits.
      called_N: the class of each slice for 'predicted class'.
    """
    return {
        'predicted class': np.stack([of_slice[..., c] for of_slice, c in zip(evidence, called_N, strict=True)]),
        'COVID-19 less pneumonia': evidence[..., COVID] - evidence[..., PNEUMONIA],
        'sick less normal': (evidence[..., COVID] + evidence[..., PNEUMONIA]) / 2 - evidence[..., NORMAL],
    }


def scale_signed(maps: np.ndarray) -> np.ndarray:
    """Divides each map of [N, S, S] by its largest absolute value, so that 0 stays 0; a map of zeros stays."""
    largest = np.abs(maps).max((1, 2), keepdims=True)
    return maps / np.where(largest > 0, largest, 1)
