"""EfficientNet-Lite0 feature extractor (Tan and Le 2019, in TensorFlow's 'lite' form for small devices).

The lite form has no squeeze-and-excitation, and ReLU6 instead of swish. Module names are those of the PyTorch package
efficientnet_lite_pytorch, which begin with an underscore, so that its weights can be loaded.

Shapes: B batch, H height, W width, C channels.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models import fast
from covidjax.models.batch_norm import BatchNorm
from covidjax.models.resnet import Conv1x1, StemConv

EPSILON = 1e-3  # of batch normalisation
HEAD_FEATURES = 1280
# The authors' code initialises convolutions with variance 2 / fan-out. A depthwise kernel has one output channel, so
# this is 2 / (k * k), and flax calls k * k the fan-in of its kernel.
_DEPTHWISE_INIT = nn.initializers.variance_scaling(2.0, 'fan_in', 'normal')


class Stage(NamedTuple):
    """A sequence of blocks of the same shape; only the first is strided.

    Attributes:
      num_blocks: number of blocks.
      size: side of the depthwise kernel.
      stride: stride of the first block.
      expansion: width inside a block divided by the width of its input.
      features: output width.
    """

    num_blocks: int
    size: int
    stride: int
    expansion: int
    features: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class DepthwiseConv(nn.Module):
    """A convolution of every channel with its own kernel, without bias, padded as TensorFlow's 'SAME'."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Returns [B, ceil(H / stride), ceil(W / stride), C]."""
        kernel = self.param('kernel', _DEPTHWISE_INIT, (self.size, self.size, 1, x_BxHxWxC.shape[-1]))
        x, kernel = nn.dtypes.promote_dtype(x_BxHxWxC, kernel)
        if self.is_initializing():
            # Only shapes matter. Tracing the fast form would take most of the time.
            strides, layout, groups = (self.stride,) * 2, ('NHWC', 'HWIO', 'NHWC'), x.shape[-1]
            return jax.lax.conv_general_dilated(
                x, kernel, strides, 'SAME', dimension_numbers=layout, feature_group_count=groups
            )
        return fast.depthwise_conv(x, kernel[:, :, 0], self.stride)


def conv1x1(features: int, name: str) -> Conv1x1:
    """Returns a 1x1 convolution that is fast for large maps with few channels."""
    return Conv1x1(features, dot_general=fast.dot_general_of_maps, name=name)


def batch_norm(train: bool, axis_name: str | None, momentum: float, name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns a batch normalisation in training or evaluation mode."""
    return functools.partial(BatchNorm(axis_name, momentum, EPSILON, name=name), train=train)


@jax.custom_vjp
def relu6(x: jax.Array) -> jax.Array:
    """Clips x to [0, 6]; the gradient is 0 at both ends, as in PyTorch."""
    return jnp.clip(x, 0, 6)


relu6.defvjp(
    lambda x: (relu6(x), x),
    lambda x, g: (fast.materialise(jnp.where((x > 0) & (x < 6), g, 0)),),
)


class InvertedBottleneck(nn.Module):
    """1x1 expansion, depthwise convolution and 1x1 projection, with a shortcut if the shapes agree.

    Attributes:
      features: output width.
      size: side of the depthwise kernel.
      stride: stride of the depthwise convolution.
      expansion: width inside divided by the width of the input; 1 omits the 1x1 expansion.
      momentum, axis_name: see `batch_norm.BatchNorm`.
    """

    features: int
    size: int
    stride: int
    expansion: int
    momentum: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, ceil(H / stride), ceil(W / stride), features]."""
        y = x
        if self.expansion > 1:
            y = conv1x1(self.expansion * x.shape[-1], '_expand_conv')(y)
            y = relu6(batch_norm(train, self.axis_name, self.momentum, '_bn0')(y))
        y = DepthwiseConv(self.size, self.stride, name='_depthwise_conv')(y)
        y = relu6(batch_norm(train, self.axis_name, self.momentum, '_bn1')(y))
        y = conv1x1(self.features, '_project_conv')(y)
        y = batch_norm(train, self.axis_name, self.momentum, '_bn2')(y)
        return fast.materialise(x + y if x.shape == y.shape else y)


class EfficientNetLite0(nn.Module):
    """Convolutional stages of EfficientNet-Lite0, without pooling and classifier: 3,371,008 parameters.

    Attributes:
      head: True ends with the 1x1 convolution to 1280 channels, False with the 320 channels of the last block.
      momentum, axis_name: see `batch_norm.BatchNorm`. The default momentum is that of ImageNet training.
    """

    head: bool = True
    momentum: float = 0.99
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images_BxHxWx1: jax.Array, *, train: bool) -> list[jax.Array]:
        """Returns features at strides 4, 8, 16 and 32, with 24, 40, 112 and 1280 (or 320) channels.

        Args:
          images_BxHxWx1: grey, in [-1, 1] (see `att2.normalise`).
          train: True uses and updates batch statistics.
        """
        # The weights were trained on (v - 127) / 128 of grey values v; the images are (v - 127.5) / 127.5.
        x = (images_BxHxWx1 * 127.5 + 0.5) / 128
        x = StemConv(32, 3, 'SAME', name='_conv_stem')(x)
        x = relu6(batch_norm(train, self.axis_name, self.momentum, '_bn0')(x))
        outputs, number = [], 0
        for stage in STAGES:
            if stage.stride == 2:
                outputs.append(x)
            for i in range(stage.num_blocks):
                stride = stage.stride if i == 0 else 1
                block = InvertedBottleneck(
                    stage.features,
                    stage.size,
                    stride,
                    stage.expansion,
                    self.momentum,
                    self.axis_name,
                    name=f'_blocks_{number}',
                )
                x = block(x, train=train)
                number += 1
        if self.head:
            x = conv1x1(HEAD_FEATURES, '_conv_head')(x)
            x = relu6(batch_norm(train, self.axis_name, self.momentum, '_bn1')(x))
        return [*outputs[1:], x]  # the first is at stride 2
