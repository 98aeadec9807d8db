"""Outlines of lungs and lesions on slices in memory, on one device."""

import functools
from typing import Any

import jax
import numpy as np
from PIL import Image

from covidjax.data.slice_lungs import find_outside_air
from covidjax.evaluation.outputs import BATCH_SIZE, apply_in_batches
from covidjax.models.att2 import normalise
from covidjax.models.fast import compile_fast
from covidjax.models.lesion_weights import LesionModel
from covidjax.models.lesions import LesionNet


@functools.partial(compile_fast, static_argnums=0)
def _outline(model: LesionNet, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(model.apply(variables, normalise(images)[..., None], train=False)).astype('float16')


def outline_slices(lesions: LesionModel, images_NxSxS: np.ndarray) -> np.ndarray:
    """Returns the probabilities of `lesions.PLANES`, float16 [N, S / 4, S / 4, 3], 0 outside the body.

    Args:
      lesions: the model.
      images_NxSxS: whole slices uint8, S = `lesions.image_size`, N at least 1.
    """

    def outline(images: np.ndarray) -> np.ndarray:
        probabilities = jax.device_get(_outline(lesions.model, lesions.folded, images))
        return np.stack([clear_outside(p, image) for p, image in zip(probabilities, images, strict=True)])

    return apply_in_batches(outline, BATCH_SIZE, images_NxSxS)


def clear_outside(probabilities_hxhxM: np.ndarray, image_SxS: np.ndarray) -> np.ndarray:
    """Returns the probabilities of a slice uint8 multiplied by the share of each position inside the body."""
    size = probabilities_hxhxM.shape[0]
    inside = Image.fromarray(np.where(find_outside_air(image_SxS), 0, 255).astype(np.uint8))
    share_hxh = np.asarray(inside.resize((size, size), Image.Resampling.BOX), np.float32) / 255
    return (probabilities_hxhxM * share_hxh[..., np.newaxis]).astype(probabilities_hxhxM.dtype)
