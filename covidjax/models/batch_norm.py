"""Batch normalisation (Ioffe and Szegedy 2015) with a hand-written gradient.

Automatic differentiation stores x - mean and reads every activation many times. Here the forward pass and the gradient
are each one pass of the form a * x + b, plus their sums.

Shapes: ... any axes, C channels.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models.fast import materialise

MOMENTUM = 0.9  # PyTorch's 0.1
EPSILON = 1e-5


class BatchNorm(nn.Module):
    """Normalises every channel to mean `bias` and standard deviation `scale`, with the variables of flax's module.

    With variables of `folding.fold_batch_norm`, which have no scale, it only adds the bias.

    Attributes:
      axis_name: axis of `jax.pmap` over which batch statistics are averaged; None elsewhere. Under `jax.jit` they
        cover the whole batch even if it is divided over devices.
      momentum: share of the running statistics that each step keeps.
      epsilon: added to the variance.
    """

    axis_name: str | None = None
    momentum: float = MOMENTUM
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns [..., C] in the dtype of x; `train` uses the batch's statistics and updates the running ones.

        Raises:
          ValueError: training with folded variables.
        """
        features = x.shape[-1]
        if not self.is_initializing() and not self.has_variable('params', 'scale'):
            if train:
                raise ValueError('folded variables are for evaluation mode: train with those of the checkpoint')
            return _add(x, self.param('bias', nn.initializers.zeros, (features,)))
        scale = self.param('scale', nn.initializers.ones, (features,))
        bias = self.param('bias', nn.initializers.zeros, (features,))
        mean = self.variable('batch_stats', 'mean', jnp.zeros, (features,))
        variance = self.variable('batch_stats', 'var', jnp.ones, (features,))
        if not train:
            a = scale * jax.lax.rsqrt(variance.value + self.epsilon)
            return _scale_and_shift(x, a, bias - mean.value * a)
        y, batch_mean, batch_variance = normalise_batch(materialise(x), scale, bias, self.axis_name, self.epsilon)
        if not self.is_initializing():
            mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
            variance.value = self.momentum * variance.value + (1 - self.momentum) * batch_variance
        return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, axis_name: str | None, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns scale * (x - mean) / sqrt(variance + epsilon) + bias, and the batch's mean and (biased) variance.

    Sums are in float32 or wider. No gradient flows through the returned statistics.

    Args:
      x: [..., C].
      scale, bias: [C].
      axis_name, epsilon: see `BatchNorm`.
    """
    return _forward(x, scale, bias, axis_name, epsilon)[0]


def _forward(x, scale, bias, axis_name, epsilon):
    wide, axes = x.astype(jnp.promote_types(x.dtype, jnp.float32)), tuple(range(x.ndim - 1))
    mean, square = _average(axis_name, wide.mean(axes), (wide * wide).mean(axes))
    variance = jnp.maximum(square - mean * mean, 0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    a = scale * inverse
    y = _scale_and_shift(x, a, bias - mean * a)
    return (y, mean, variance), (x, scale, mean, inverse)


def _backward(axis_name, _, kept, gradients):
    x, scale, mean, inverse = kept
    wide, axes = x.astype(mean.dtype), tuple(range(x.ndim - 1))
    g = gradients[0].astype(mean.dtype)
    count = x.size // x.shape[-1]
    d_bias = g.sum(axes)
    d_scale = inverse * ((g * wide).sum(axes) - mean * d_bias)
    mean_g, mean_gx = _average(axis_name, d_bias / count, d_scale / count)
    # The gradient is a * (g - mean(g) - z * mean(g * z)), where z = (x - mean) * inverse.
    a = scale * inverse
    b = a * inverse * mean_gx
    d_x = _scale_and_shift(g, a, b * mean - a * mean_g) - _scale_and_shift(wide, b, jnp.zeros_like(b))
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(scale.dtype)


def _scale_and_shift(x: jax.Array, a_C: jax.Array, b_C: jax.Array) -> jax.Array:
    axes = tuple(range(x.ndim - 1))
    return (x * jnp.expand_dims(a_C, axes) + jnp.expand_dims(b_C, axes)).astype(x.dtype)


def _add(x: jax.Array, b_C: jax.Array) -> jax.Array:
    return (x + jnp.expand_dims(b_C, tuple(range(x.ndim - 1)))).astype(x.dtype)


def _average(axis_name, *values):
    return values if axis_name is None else jax.lax.pmean(values, axis_name)


normalise_batch.defvjp(_forward, _backward)
