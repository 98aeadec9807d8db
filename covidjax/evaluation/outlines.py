"""Outlines of lungs and lesions on slices in memory, on one device."""

import functools
from typing import Any

import jax
import numpy as np

from covidjax.evaluation.outputs import BATCH_SIZE, apply_in_batches
from covidjax.models.att2 import normalise
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.models.lesion_weights import LesionModel
from covidjax.models.lesions import LesionNet


@functools.partial(compile_fast, static_argnums=0)
def _outline(model: LesionNet, variables: dict[str, Any], images: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(model.apply(variables, normalise(images)[..., None], train=False)).astype('float16')


def outline_slices(lesions: LesionModel, images_NxSxS: np.ndarray) -> np.ndarray:
    """Returns the probabilities of `lesions.PLANES`, float16 [N, S / 4, S / 4, 3].

    Args:
      lesions: the model.
      images_NxSxS: whole slices uint8, S = `lesions.image_size`, N at least 1.
    """
    return apply_in_batches(
        functools.partial(_outline, lesions.model, fold_batch_norm(lesions.variables)), BATCH_SIZE, images_NxSxS
    )
