"""Outputs of a slice model for slices in memory, on one device."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covidjax.models.att2 import Att2, normalise
from covidjax.models.fast import compile_fast

BATCH_SIZE = 16


class SliceOutputs(NamedTuple):
    """Outputs of a slice model for N slices.

    Attributes:
      logits, embedding, attention, evidence: see `att2.Att2Outputs`.
      statistics: mean and standard deviation over the map of every channel of every stage [N, F]. Early stages reflect
        noise, sharpness and contrast, late ones the content.
    """

    logits: np.ndarray
    embedding: np.ndarray
    attention: tuple[np.ndarray, np.ndarray]
    evidence: tuple[np.ndarray, np.ndarray]
    statistics: np.ndarray


@functools.partial(compile_fast, static_argnums=0)
def _apply(model: Att2, variables: Any, images: jax.Array) -> SliceOutputs:
    outputs, captured = model.apply(
        variables,
        normalise(images),
        train=False,
        mutable=['intermediates'],
        capture_intermediates=lambda module, _: module.name == 'backbone',
    )
    stages = captured['intermediates']['backbone']['__call__'][0]  # of the slice; a model may add its mirror image
    moments = [moment for x in stages for moment in (x.mean((1, 2)), x.std((1, 2)))]
    return SliceOutputs(*outputs, statistics=jnp.concatenate(moments, axis=-1))


def compute_outputs(model: Att2, variables: Any, images: np.ndarray) -> SliceOutputs:
    """Returns the model's outputs for images uint8 [N, S, S, 1], N at least 1."""
    return apply_in_batches(functools.partial(_apply, model, variables), BATCH_SIZE, images)


def apply_in_batches(apply: Callable[..., Any], batch_size: int, *arrays: np.ndarray) -> Any:
    """Applies a compiled function to N examples in batches of one shape; returns its outputs as numpy arrays.

    Args:
      apply: arrays [batch_size, ...] -> a tree of arrays [batch_size, ...]; treats each example separately.
      batch_size: of every call.
      arrays: its arguments, [N, ...] each, N at least 1.
    """
    count, parts = len(arrays[0]), []
    for start in range(0, count, batch_size):
        number = min(batch_size, count - start)
        chosen = np.arange(start, start + batch_size).clip(max=count - 1)  # pad the last batch with the last example
        outputs = jax.device_get(apply(*(array[chosen] for array in arrays)))
        parts.append(jax.tree.map(lambda x, number=number: x[:number], outputs))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
