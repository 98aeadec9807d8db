"""Plain operations in forms that a CPU runs fast, equal to the plain ones up to rounding.

All that is written for a platform stands here. What XLA does badly on a CPU (jaxlib 0.10), and what is done about it:

- It computes an activation anew inside every operation that uses it, for residual blocks back to the start of their
  stage, and transposes gradients element by element on the way: `materialise` keeps them from being fused.
- It drops what `materialise` asks for before it decides about fusions: `compile_fast` keeps it.
- Max-pooling compares windows one element at a time, and its gradient scatters: `max_pool`.
- A 1x1 convolution is slower than the equal matrix product: `resnet.Conv1x1`.

Batch normalisation with a gradient by hand is in `batch_norm`; memory between steps in `training.memory`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

_KEEP_BARRIERS = {'xla_disable_hlo_passes': 'cse_barrier_expander'}


def compile_fast(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Returns `jax.jit(function, **options)`; on a CPU `materialise` has its effect in it.

    It asks which platform there is, and so must not be called at import.
    """
    is_cpu = jax.default_backend() == 'cpu'
    return jax.jit(function, compiler_options=_KEEP_BARRIERS if is_cpu else None, **options)


@jax.custom_vjp
def materialise(x: jax.Array) -> jax.Array:
    """Returns x; on a CPU it and its gradient are computed once and kept in memory. Reverse-mode gradients only."""
    return _keep(x)


def _keep(x: jax.Array) -> jax.Array:
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


materialise.defvjp(lambda x: (_keep(x), None), lambda _, g: (_keep(g),))


def max_pool(x_BxHxWxC: jax.Array) -> jax.Array:
    """Returns the maxima of 3x3 windows, [B, H/2, W/2, C]: stride 2, one pixel of padding, H and W even.

    The gradient goes to the first maximum of a window, as in PyTorch. Reverse-mode gradients only.
    """
    return _max_pool(x_BxHxWxC)


@jax.custom_vjp
def _max_pool(x: jax.Array) -> jax.Array:
    return functools.reduce(jnp.maximum, _list_windows(x))


def _list_windows(x: jax.Array) -> list[jax.Array]:
    """Returns the nine members of all windows, each [B, H/2, W/2, C], row by row."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return [
        jax.lax.slice(padded, (0, i, j, 0), (b, i + h - 1, j + w - 1, c), (1, 2, 2, 1))
        for i in range(3)
        for j in range(3)
    ]


def _max_pool_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    first, *others = _list_windows(x)
    maximum, place = first, jnp.zeros(first.shape, jnp.uint8)
    for i, member in enumerate(others, start=1):
        place = jnp.where(member > maximum, jnp.uint8(i), place)
        maximum = jnp.maximum(maximum, member)
    return maximum, place


def _max_pool_backward(place: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    b, h, w, c = g.shape

    def shift(t: jax.Array, axis: int) -> jax.Array:
        return jnp.concatenate([jax.lax.slice_in_dim(t, 1, None, axis=axis), jnp.zeros_like(t.take(jnp.array([0]), axis))], axis)

    # Window o covers the pixels 2o - 1, 2o and 2o + 1: an even pixel lies in one window, an odd one in two.
    def merge(first: jax.Array, middle: jax.Array, last: jax.Array, axis: int) -> jax.Array:
        return jnp.stack([middle, last + shift(first, axis)], axis + 1)

    rows = [merge(*(jnp.where(place == 3 * i + j, g, 0) for i in range(3)), axis=1) for j in range(3)]
    rows = [row.reshape(b, 2 * h, w, c) for row in rows]
    return (merge(*rows, axis=2).reshape(b, 2 * h, 2 * w, c),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
