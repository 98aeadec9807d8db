"""Outputs of a slice model for slices in memory, on one device."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from covidjax.models.att2 import Att2, normalise, split_views
from covidjax.models.fast import compile_fast

BATCH_SIZE = 8
# XLA leaves cores idle wherever an operation runs on one; two batches at a time fill them. A GPU or TPU queues them.
_NUM_THREADS = 2
ROUND_SIZE = _NUM_THREADS * BATCH_SIZE  # slices that `OutputQueue` computes at a time


class SliceOutputs(NamedTuple):
    """Outputs of a slice model for N slices.

    Attributes:
      logits, embedding, attention, evidence: see `att2.Att2Outputs`.
      statistics: mean and standard deviation over the map of every channel of every stage [N, F], of EfficientNet-Lite0
        without its head. Early stages reflect noise, sharpness and contrast, late ones the content.
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
    stages = captured['intermediates']['backbone']['__call__'][0]
    if model.mirror:
        stages, _ = split_views(stages)
    if model.backbone == 'efficientnet_lite0':
        # Most channels of the head are 0 on most slices. Their rare values would make every held-out patient unusual.
        stages = stages[:-1]
    moments = [moment for x in stages for moment in (x.mean((1, 2)), x.std((1, 2)))]
    return SliceOutputs(*outputs, statistics=jnp.concatenate(moments, axis=-1))


def compute_outputs(model: Att2, variables: Any, images: np.ndarray) -> SliceOutputs:
    """Returns the model's outputs for images uint8 [N, S, S, 1], N at least 1."""
    return apply_in_batches(functools.partial(_apply, model, variables), BATCH_SIZE, images)


class OutputQueue:
    """Collects the slices of several scans and runs models over full batches that mix them.

    Args:
      members: (model, variables) of every model: see `compute_outputs`, whose results are the same.
    """

    def __init__(self, members: Sequence[tuple[Att2, Any]]):
        def apply(images: jax.Array) -> tuple[SliceOutputs, ...]:
            return tuple(_apply(model, variables, images) for model, variables in members)

        self._apply = apply
        self._waiting: deque[tuple[Any, np.ndarray]] = deque()  # key and slices that no batch has taken
        self._counts: dict[Any, int] = {}
        self._parts: dict[Any, list[tuple[SliceOutputs, ...]]] = {}
        self.num_slices = 0

    def add(self, key: Any, images_NxSxSx1: np.ndarray) -> None:
        """Appends the slices of a scan, uint8, at least one."""
        self._waiting.append((key, images_NxSxSx1))
        self._counts[key], self._parts[key] = len(images_NxSxSx1), []
        self.num_slices += len(images_NxSxSx1)

    def __len__(self) -> int:
        return len(self._counts)

    def compute_batch(self) -> list[tuple[Any, tuple[SliceOutputs, ...]]]:
        """Runs the models over the next `ROUND_SIZE` slices, or all that wait.

        Returns:
          (key, outputs of every model) of the scans that are complete.
        """
        taken, number = [], 0
        while self._waiting and number < ROUND_SIZE:
            key, images = self._waiting.popleft()
            room = ROUND_SIZE - number
            if len(images) > room:
                self._waiting.appendleft((key, images[room:]))
                images = images[:room]
            taken.append((key, images))
            number += len(images)
        self.num_slices -= number
        outputs = apply_in_batches(self._apply, BATCH_SIZE, np.concatenate([images for _, images in taken]))
        complete, start = [], 0
        for key, images in taken:
            stop = start + len(images)
            self._parts[key].append(jax.tree.map(lambda x, start=start, stop=stop: x[start:stop], outputs))
            self._counts[key] -= len(images)
            start = stop
            if not self._counts[key]:
                parts = self._parts.pop(key)
                del self._counts[key]
                complete.append((key, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)))
        return complete


def apply_in_batches(apply: Callable[..., Any], batch_size: int, *arrays: np.ndarray) -> Any:
    """Applies a compiled function to N examples in batches of one shape; returns its outputs as numpy arrays.

    Args:
      apply: arrays [batch_size, ...] -> a tree of arrays [batch_size, ...]; treats each example separately.
      batch_size: of every call.
      arrays: its arguments, [N, ...] each, N at least 1.
    """
    count = len(arrays[0])

    def apply_from(start: int) -> Any:
        chosen = np.arange(start, start + batch_size).clip(max=count - 1)  # pad the last batch with the last example
        outputs = jax.device_get(apply(*(array[chosen] for array in arrays)))
        return jax.tree.map(lambda x: x[: min(batch_size, count - start)], outputs)

    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        parts = list(pool.map(apply_from, range(0, count, batch_size)))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
