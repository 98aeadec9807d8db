"""ResNet feature extractor (He et al. 2016) in torchvision's v1.5 form.

Shapes: B batch, H height, W width, C channels.
"""

import functools
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax

from covidjax.models import fast
from covidjax.models.batch_norm import BatchNorm

# He et al. 2015, eq. 10, as torchvision initialises every convolution of its ResNets.
KAIMING_FAN_OUT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class Conv1x1(nn.Module):
    """A 1x1 convolution without bias, computed as a matrix product.

    On a CPU, XLA runs a matrix product several times faster than the equivalent convolution.
    """

    features: int
    stride: int = 1
    dot_general: Callable[..., jax.Array] = fast.dot_general

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Returns [B, ceil(H / stride), ceil(W / stride), features]."""
        x = x_BxHxWxC[:, :: self.stride, :: self.stride]
        return nn.Dense(
            self.features, use_bias=False, kernel_init=KAIMING_FAN_OUT, dot_general=self.dot_general, name='dense'
        )(x)


class StemConv(nn.Module):
    """The first convolution: stride 2, no bias, applied to a grey image as if it had three equal channels.

    The kernel has three input channels, as in ImageNet weights. It is summed over them and applied to the one channel.
    """

    features: int
    size: int
    padding: str | Sequence[tuple[int, int]]

    @nn.compact
    def __call__(self, x_BxHxWx1: jax.Array) -> jax.Array:
        """Returns [B, ceil(H / 2), ceil(W / 2), features]."""
        kernel = self.param('kernel', KAIMING_FAN_OUT, (self.size, self.size, 3, self.features))
        image, kernel = nn.dtypes.promote_dtype(x_BxHxWx1, kernel.sum(2, keepdims=True))
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            window_strides=(2, 2),
            padding=self.padding,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )


class Conv3x3(nn.Module):
    """A 3x3 convolution without bias, padded by one pixel on each side as in PyTorch."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        """Returns [B, ceil(H / stride), ceil(W / stride), features]."""
        kernel = self.param('kernel', KAIMING_FAN_OUT, (3, 3, x_BxHxWxC.shape[-1], self.features))
        return fast.conv3x3(*nn.dtypes.promote_dtype(x_BxHxWxC, kernel), self.stride)


def batch_norm(train: bool, axis_name: str | None, name: str) -> Callable[[jax.Array], jax.Array]:
    """Returns a batch normalisation in training or evaluation mode."""
    return functools.partial(BatchNorm(axis_name, name=name), train=train)


def relu(x: jax.Array) -> jax.Array:
    """ReLU, materialised once so that later operations reuse it."""
    return fast.materialise(nn.relu(x))


class BottleneckBlock(nn.Module):
    """1x1, 3x3 (strided) and 1x1 convolutions with a shortcut; `features` is the output width."""

    features: int
    stride: int = 1
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""
        inner = self.features // 4
        y = relu(batch_norm(train, self.axis_name, 'bn1')(Conv1x1(inner, name='conv1')(x)))
        y = relu(batch_norm(train, self.axis_name, 'bn2')(Conv3x3(inner, self.stride, name='conv2')(y)))
        y = batch_norm(train, self.axis_name, 'bn3')(Conv1x1(self.features, name='conv3')(y))
        if x.shape != y.shape:
            x = batch_norm(train, self.axis_name, 'downsample_bn')(
                Conv1x1(self.features, self.stride, name='downsample_conv')(x)
            )
        return relu(x + y)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; `features` is the output width."""

    features: int
    stride: int = 1
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps [B, H, W, C] to [B, H / stride, W / stride, features]."""
        y = relu(batch_norm(train, self.axis_name, 'bn1')(Conv3x3(self.features, self.stride, name='conv1')(x)))
        y = batch_norm(train, self.axis_name, 'bn2')(Conv3x3(self.features, name='conv2')(y))
        if x.shape != y.shape:
            x = batch_norm(train, self.axis_name, 'downsample_bn')(
                Conv1x1(self.features, self.stride, name='downsample_conv')(x)
            )
        return relu(x + y)


BLOCKS = {'bottleneck': BottleneckBlock, 'basic': BasicBlock}


def stage_features(block: str, width: int, stage: int) -> int:
    """Returns the output width of a stage (from 0) of a ResNet with base width `width`."""
    return width * 2**stage * (4 if block == 'bottleneck' else 1)


class ResNet(nn.Module):
    """Convolutional stages of a ResNet, without pooling and classifier.

    The defaults give torchvision's ResNet-50, with 23,508,032 parameters. Its stages 3 and 4 end with the paper's
    convolutions 40 and 49. Names follow torchvision: conv1, bn1, layer1_0 ... layer4_2.

    Attributes:
      stage_sizes: blocks per stage; every stage after the first halves the map and doubles the width.
      width: base width, 64 in all published ResNets.
      block: 'bottleneck' or 'basic'.
      stem: 'imagenet' (7x7 stride 2, then 3x3 max-pool stride 2: map H/4) or 'small' (3x3 stride 2: map H/2).
      axis_name: axis of `jax.pmap` over which BatchNorm takes batch statistics; None without pmap.
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    block: str = 'bottleneck'
    stem: str = 'imagenet'
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x_BxHxWx1: jax.Array, *, train: bool) -> list[jax.Array]:
        """Returns the output of every stage i, [B, H/(4*2^i), W/(4*2^i), C_i] with the imagenet stem."""
        size, pad = {'imagenet': (7, 3), 'small': (3, 1)}[self.stem]
        x = StemConv(self.width, size, ((pad, pad), (pad, pad)), name='conv1')(x_BxHxWx1)
        x = relu(batch_norm(train, self.axis_name, 'bn1')(x))
        if self.stem == 'imagenet':
            x = fast.max_pool(x)
        outputs = []
        for stage, num_blocks in enumerate(self.stage_sizes):
            features = stage_features(self.block, self.width, stage)
            for i in range(num_blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                block = BLOCKS[self.block](features, stride, self.axis_name, name=f'layer{stage + 1}_{i}')
                x = block(x, train=train)
            outputs.append(x)
        return outputs
