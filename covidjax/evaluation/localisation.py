"""How well an attention map points at a lesion, on slices whose lesion masks are known.

Every score has a chance level, which a flat map gets exactly: the share of pixels that are lesion for pointing game and
energy, 0.5 for the AUC. Attention knows where lungs tend to be, so a second yardstick is a map that looks at the centre
of every slice (`create_centre_map`).

Shapes: N slices, S side of a slice in pixels, h and w those of an attention map.
"""

from collections.abc import Sequence

import jax
import numpy as np
import scipy.stats

SCORES = ('pointing', 'energy', 'auc')


def upsample_maps(maps_Nxhxw: np.ndarray, size: int) -> np.ndarray:
    """Returns maps bilinearly enlarged to float32 [N, S, S], pixel centres at half-integer positions."""
    shape = (len(maps_Nxhxw), size, size)
    return np.asarray(jax.image.resize(np.asarray(maps_Nxhxw, np.float32), shape, 'bilinear'))


def combine_maps(maps: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Returns the geometric mean of the maps of all attention modules, enlarged to float32 [N, S, S].

    For two maps it is the square-rooted product of the paper's Fig. 7. A map of several modules is high only where all
    of them look.

    Args:
      maps: per module [N, h, w], not negative.
      size: S.
    """
    enlarged = [upsample_maps(one, size) for one in maps]
    return np.prod(enlarged, axis=0) ** (1 / len(enlarged))


def create_centre_map(size: int) -> np.ndarray:
    """Returns float64 [S, S], a gaussian about the centre with a standard deviation of a quarter of the side."""
    offset = (np.arange(size) - (size - 1) / 2) / (size / 4)
    return np.exp(-0.5 * (offset[:, None] ** 2 + offset[None] ** 2))


def compute_localisation(map_SxS: np.ndarray, mask_SxS: np.ndarray) -> dict[str, float | None]:
    """Scores one map against one mask.

    Args:
      map_SxS: attention, not negative and finite; only its proportions count.
      mask_SxS: bool, True on lesion.

    Returns:
      'pointing': 1 if the highest pixel lies on lesion, else 0; of several equally high ones the share that does.
      'energy': the share of the map's sum that lies on lesion; None for a map of zeros.
      'auc': the probability that a lesion pixel is higher than another pixel, ties counting half.
      'lesion_share': the share of pixels that are lesion.
      Without a lesion all three scores are None; the AUC also where every pixel is lesion.

    Raises:
      ValueError: shapes differ, or the map has negative or non-finite values.
    """
    if map_SxS.shape != mask_SxS.shape:
        raise ValueError(f'the map has shape {map_SxS.shape}, the mask {mask_SxS.shape}')
    values, lesion = map_SxS.ravel().astype(np.float64), mask_SxS.ravel().astype(bool)
    if not (np.isfinite(values) & (values >= 0)).all():
        raise ValueError(f'a map must be finite and not negative, got values from {values.min()} to {values.max()}')
    num_lesion, num_other = int(lesion.sum()), int((~lesion).sum())
    scores = dict.fromkeys(SCORES) | {'lesion_share': num_lesion / lesion.size}
    if num_lesion:
        scores['pointing'] = float(lesion[values == values.max()].mean())
        if values.max() > 0:
            scores['energy'] = float(values[lesion].sum() / values.sum())
        if num_other:
            # The rank statistic of Mann and Whitney.
            ranks = scipy.stats.rankdata(values)[lesion]
            scores['auc'] = float((ranks.sum() - num_lesion * (num_lesion + 1) / 2) / (num_lesion * num_other))
    return scores
