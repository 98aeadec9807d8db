"""Folds batch normalisation into the convolutions before it: the same outputs in evaluation mode, with less work.

With stored statistics, batch normalisation is a * y + b with one a and one b per channel. A convolution is linear, so
scaling its kernel by a leaves only b to add:

  a = scale / sqrt(variance + epsilon),  kernel' = kernel * a,  b = bias - mean * a.
"""

from typing import Any

import jax
import numpy as np

from covidjax.models import batch_norm, efficientnet

# Name of a batch normalisation -> names of the convolution before it; a module has one of them.
_CONVOLUTIONS = {
    'bn1': ('conv1',),
    'bn2': ('conv2',),
    'bn3': ('conv3',),
    'downsample_bn': ('downsample_conv',),
    '_bn0': ('_conv_stem', '_expand_conv'),
    '_bn1': ('_conv_head', '_depthwise_conv'),
    '_bn2': ('_project_conv',),
    'decoder_bn_0': ('decoder_0',),
    'decoder_bn_1': ('decoder_1',),
    'decoder_bn_2': ('decoder_2',),
}


def fold_batch_norm(variables: dict[str, Any]) -> dict[str, Any]:
    """Returns variables for evaluation mode, without batch statistics, on the devices of the given ones.

    They fit the same model: a `batch_norm.BatchNorm` that has no scale adds its bias. Outputs are equal up to rounding.
    Variables that are folded already are returned as they are.

    Args:
      variables: 'params' and 'batch_stats' of `Att2`, `Seq`, `LesionNet` or one of their parts.
    """
    if not variables.get('batch_stats'):
        return variables
    return {'params': _fold_module(variables['params'], variables['batch_stats'])}


def _fold_module(params: dict[str, Any], statistics: dict[str, Any]) -> dict[str, Any]:
    folded = dict(params)
    for name, below in statistics.items():
        if 'var' not in below:
            folded[name] = _fold_module(params[name], below)
            continue
        epsilon = efficientnet.EPSILON if name.startswith('_') else batch_norm.EPSILON
        scale_C = _widen(params[name]['scale']) / np.sqrt(_widen(below['var']) + epsilon)
        bias = params[name]['bias']
        folded[name] = {'bias': _replace(bias, _widen(bias) - _widen(below['mean']) * scale_C)}
        convolution = next(other for other in _CONVOLUTIONS[name] if other in params)
        folded[convolution] = _scale_kernel(params[convolution], scale_C)
    return folded


def _scale_kernel(convolution: dict[str, Any], scale_C: np.ndarray) -> dict[str, Any]:
    # The last axis of every kernel, also of a depthwise one, is that of the output channels.
    return jax.tree.map(lambda kernel: _replace(kernel, _widen(kernel) * scale_C), convolution)


def _widen(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def _replace(leaf: Any, value: np.ndarray) -> jax.Array:
    return jax.device_put(value.astype(leaf.dtype), getattr(leaf, 'sharding', None))
