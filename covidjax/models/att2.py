"""ResNet50-ATT2: a ResNet with a tail and two attention modules (the paper's section IV-A).

Shapes: B batch, H height, W width, C channels, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models.attention import LINEAR_INIT, NEED_GLOBAL_FEATURE, ImageAttention
from covidjax.models.resnet import BLOCKS, ResNet, stage_features

COMBINATIONS = ('concat', 'average')


class Att2Outputs(NamedTuple):
    """What the model says of a batch of slices.

    Attributes:
      logits: [B, K] float32.
      embedding: [B, C1 + C2] the context vectors of both modules, 3072 wide in the paper.
      attention: per module [B, h, w], sums to 1 over the map; 14x14 and 7x7 at 224 px.
    """

    logits: jax.Array
    embedding: jax.Array
    attention: tuple[jax.Array, jax.Array]


class Att2(nn.Module):
    """ResNet with attention after its last two stages; with the defaults the paper's ResNet50-ATT2.

    The tail (`tail_blocks` stride-1 blocks after the last stage, averaged over the map) computes the global feature g.
    Under 'additive' compatibility g cancels (see `attention.ImageAttention`) and 'uniform' has no g, so that the tail
    is dead weight: 13,387,776 of the paper's parameters. It stays in the parameter tree (59 layers, parity, export),
    but is neither computed nor are its batch statistics updated unless `full=True`; initialise with `full=True` to
    create it.

    Attributes:
      stage_sizes, width, block, stem, axis_name: see `resnet.ResNet`.
      tail_blocks: number of blocks in the tail.
      num_classes: K.
      compatibility: 'additive' (eq. 11), 'dot' (eq. 12), 'tanh' or 'uniform' (average pooling).
      combination: 'concat' (one classifier on both context vectors) or 'average' (one each, probabilities averaged).
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    block: str = 'bottleneck'
    stem: str = 'imagenet'
    tail_blocks: int = 3
    num_classes: int = 3
    compatibility: str = 'additive'
    combination: str = 'concat'
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images_BxHxWx1: jax.Array, *, train: bool, full: bool = False) -> Att2Outputs:
        """Classifies grey slices.

        Args:
          images_BxHxWx1: float32 in [-1, 1] (see `normalise`); each stands for three equal channels, as ImageNet
            weights take them (see `resnet.StemConv`).
          train: True uses and updates batch statistics (collection 'batch_stats').
          full: True also computes a tail that cannot change the output.
        """
        if self.combination not in COMBINATIONS:
            raise ValueError(f'combination must be one of {COMBINATIONS}, got {self.combination!r}')
        backbone = ResNet(self.stage_sizes, self.width, self.block, self.stem, self.axis_name, name='backbone')
        *_, x1, x2 = backbone(images_BxHxWx1, train=train)
        features = stage_features(self.block, self.width, len(self.stage_sizes) - 1)
        g = None
        if full or self.compatibility in NEED_GLOBAL_FEATURE:
            y = x2
            for i in range(self.tail_blocks):
                y = BLOCKS[self.block](features, axis_name=self.axis_name, name=f'tail_{i}')(y, train=train)
            g = y.mean((1, 2))
        contexts, maps = [], []
        for i, local in enumerate((x1, x2)):
            b, h, w, c = local.shape
            attend = ImageAttention(self.compatibility, features, name=f'attention{i + 1}')
            context_BxC, attention_BxN = attend(local.reshape(b, h * w, c), g)
            contexts.append(context_BxC)
            maps.append(attention_BxN.reshape(b, h, w))
        embedding = jnp.concatenate(contexts, axis=-1)
        if self.combination == 'concat':
            logits = nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name='classifier')(embedding)
        else:
            log_p = [
                nn.log_softmax(nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name=f'classifier{i + 1}')(context))
                for i, context in enumerate(contexts)
            ]
            logits = jax.nn.logsumexp(jnp.stack(log_p), axis=0) - jnp.log(len(log_p))
        return Att2Outputs(logits, embedding, (maps[0], maps[1]))


def normalise(images: jax.Array) -> jax.Array:
    """Maps grey values from [0, 255] to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def is_dead(path: str, compatibility: str) -> bool:
    """Says whether the parameter at `path` ('tail_0/conv1/...') cannot change the output of `Att2`."""
    return compatibility not in NEED_GLOBAL_FEATURE and path.startswith('tail_')
