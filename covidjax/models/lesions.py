"""Segmentation of lungs and lesions: EfficientNet-Lite0 with a light decoder (after U-Net, Ronneberger et al. 2015).

Shapes: B batch, S side of a slice, C channels. The outputs have a quarter of the resolution of the input.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models.att2 import average_views, split_views, stack_views
from covidjax.models.batch_norm import BatchNorm
from covidjax.models.efficientnet import EfficientNetLite0
from covidjax.models.resnet import Conv3x3, relu

PLANES = ('lungs', 'lesion', 'consolidation')  # the last is given that a position is lesion
STRIDE = 4
_DECODER = (64, 48, 32)  # channels at strides 16, 8 and 4
_MOMENTUM = 0.9  # of the batch statistics, as in `att2`: fine-tuning is short


class LesionNet(nn.Module):
    """Outlines lungs, lesions and, within lesions, consolidation: 3,273,731 parameters.

    Each decoder step doubles the resolution, appends the encoder's features of that resolution, and applies a 3x3
    convolution, batch normalisation and ReLU.

    Attributes:
      mirror: True averages the logits of a slice and of its mirror image in evaluation. Takes twice the time.
      axis_name: see `resnet.ResNet`.
    """

    mirror: bool = True
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images_BxSxSx1: jax.Array, *, train: bool) -> jax.Array:
        """Returns logits float32 [B, S / 4, S / 4, 3] of `PLANES`.

        Args:
          images_BxSxSx1: grey whole slices in [-1, 1] (see `att2.normalise`); S is a multiple of 32.
          train: True uses and updates batch statistics (collection 'batch_stats').

        Raises:
          ValueError: S is not a multiple of 32.
        """
        if images_BxSxSx1.shape[1] % 32 or images_BxSxSx1.shape[2] % 32:
            raise ValueError(f'sides must be multiples of 32, got {images_BxSxSx1.shape[1:3]}')
        encoder = EfficientNetLite0(head=False, momentum=_MOMENTUM, axis_name=self.axis_name, name='backbone')
        convolutions = [Conv3x3(features, name=f'decoder_{i}') for i, features in enumerate(_DECODER)]
        norms = [BatchNorm(self.axis_name, _MOMENTUM, name=f'decoder_bn_{i}') for i in range(len(_DECODER))]
        classifier = nn.Dense(len(PLANES), name='classifier')

        def outline(images: jax.Array) -> jax.Array:
            *skips, x = encoder(images, train=train)
            for convolution, norm, skip in zip(convolutions, norms, reversed(skips), strict=True):
                x = jnp.concatenate([_double(x), skip], axis=-1)
                x = relu(norm(convolution(x), train=train))
            return classifier(x).astype(jnp.float32)

        if self.mirror and not train and not self.is_initializing():
            ((logits,), (mirrored,)) = split_views([outline(stack_views(images_BxSxSx1))])
            return average_views([logits, mirrored])
        return outline(images_BxSxSx1)


def _double(x_BxHxWxC: jax.Array) -> jax.Array:
    """Repeats every row and column."""
    b, h, w, c = x_BxHxWxC.shape
    x = jnp.broadcast_to(x_BxHxWxC[:, :, None, :, None], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
