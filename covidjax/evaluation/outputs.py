"""Everything that a slice model says of slices, on one device: for scans outside a dataset."""

import functools
from typing import Any

import jax
import numpy as np

from covidjax.models.att2 import Att2, Att2Outputs, normalise

BATCH_SIZE = 16


@functools.partial(jax.jit, static_argnums=0)
def _apply(model: Att2, variables: Any, images: jax.Array) -> Att2Outputs:
    return model.apply(variables, normalise(images), train=False)


def compute_outputs(model: Att2, variables: Any, images: np.ndarray) -> Att2Outputs:
    """Returns logits, embeddings and attention maps, as numpy arrays, of images uint8 [N, S, S, 1], N at least 1."""
    parts = []
    for start in range(0, len(images), BATCH_SIZE):
        number = min(BATCH_SIZE, len(images) - start)
        chosen = np.arange(start, start + BATCH_SIZE).clip(max=len(images) - 1)  # one shape for all batches
        outputs = jax.device_get(_apply(model, variables, images[chosen]))
        parts.append(jax.tree.map(lambda x, number=number: x[:number], outputs))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
