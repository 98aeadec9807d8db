"""ResNet50-ATT2: a ResNet with a tail and two attention modules (the paper's section IV-A), and its light form.

Shapes: B batch, H height, W width, C channels, K classes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models.attention import LINEAR_INIT, NEED_GLOBAL_FEATURE, ImageAttention
from covidjax.models.efficientnet import HEAD_FEATURES, STAGES, EfficientNetLite0
from covidjax.models.resnet import BLOCKS, ResNet, stage_features

BACKBONES = ('resnet', 'efficientnet_lite0')
COMBINATIONS = ('concat', 'average')


class Att2Outputs(NamedTuple):
    """What the model says of a batch of slices.

    Attributes:
      logits: [B, K] float32.
      embedding: [B, C1 + C2] the context vectors of both modules, 3072 wide in the paper; before dropout.
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

    With backbone 'efficientnet_lite0' the local features have 112 and 1280 channels, the map's sides are those of the
    ResNet, and there is no tail: the global feature is the average of the last features over the map.

    Attributes:
      stage_sizes, width, block, stem: see `resnet.ResNet`; of that backbone only.
      axis_name: see `resnet.ResNet`.
      tail_blocks: number of blocks in the tail; of the ResNet only.
      num_classes: K.
      compatibility: 'additive' (eq. 11), 'dot' (eq. 12), 'tanh' or 'uniform' (average pooling).
      combination: 'concat' (one classifier on both context vectors) or 'average' (one each, probabilities averaged).
      backbone: one of BACKBONES.
      dropout: share of the embedding that training leaves out; the rest is scaled up.
      mirror: in evaluation, average the context vectors of a slice and of its mirror image, and their attention maps
        after mirroring back; it takes twice the time.
    """

    stage_sizes: Sequence[int] = (3, 4, 6, 3)
    width: int = 64
    block: str = 'bottleneck'
    stem: str = 'imagenet'
    tail_blocks: int = 3
    num_classes: int = 3
    compatibility: str = 'additive'
    combination: str = 'concat'
    backbone: str = 'resnet'
    dropout: float = 0.0
    mirror: bool = False
    axis_name: str | None = None

    @nn.nowrap
    def local_features(self) -> tuple[int, int]:
        """Returns the channels of the features that the two attention modules read; their sum is the embedding's."""
        if self.backbone == 'efficientnet_lite0':
            return STAGES[-3].features, HEAD_FEATURES
        last = len(self.stage_sizes) - 1
        return tuple(stage_features(self.block, self.width, stage) for stage in (last - 1, last))

    @nn.compact
    def __call__(
        self, images_BxHxWx1: jax.Array, *, train: bool, full: bool = False, dropout_keys_B: jax.Array | None = None
    ) -> Att2Outputs:
        """Classifies grey slices.

        Args:
          images_BxHxWx1: float32 in [-1, 1] (see `normalise`); each stands for three equal channels, as ImageNet
            weights take them (see `resnet.StemConv`).
          train: True uses and updates batch statistics (collection 'batch_stats').
          full: True also computes a global feature that cannot change the output.
          dropout_keys_B: a key per example, so that what is left out does not depend on the number of devices. Needed
            if and only if `train` and `dropout`.
        """
        if self.backbone not in BACKBONES:
            raise ValueError(f'backbone must be one of {BACKBONES}, got {self.backbone!r}')
        if self.combination not in COMBINATIONS:
            raise ValueError(f'combination must be one of {COMBINATIONS}, got {self.combination!r}')
        if (dropout_keys_B is not None) != (train and self.dropout > 0):
            given = 'no' if dropout_keys_B is None else 'some'
            raise ValueError(f'train={train} and dropout={self.dropout}, but {given} dropout keys')
        if self.backbone == 'resnet':
            backbone = ResNet(self.stage_sizes, self.width, self.block, self.stem, self.axis_name, name='backbone')
        else:
            backbone = EfficientNetLite0(axis_name=self.axis_name, name='backbone')
        features = self.local_features()[1]
        tail_blocks = self.tail_blocks if self.backbone == 'resnet' else 0
        tail = [BLOCKS[self.block](features, axis_name=self.axis_name, name=f'tail_{i}') for i in range(tail_blocks)]
        attend = [ImageAttention(self.compatibility, features, name=f'attention{i + 1}') for i in range(2)]

        def look(images: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
            """Returns both modules' context vectors and attention maps."""
            *_, x1, x2 = backbone(images, train=train)
            g = None
            if full or self.compatibility in NEED_GLOBAL_FEATURE:
                y = x2
                for block in tail:
                    y = block(y, train=train)
                g = y.mean((1, 2))
            contexts, maps = [], []
            for module, local in zip(attend, (x1, x2), strict=True):
                b, h, w, c = local.shape
                context_BxC, attention_BxN = module(local.reshape(b, h * w, c), g)
                contexts.append(context_BxC)
                maps.append(attention_BxN.reshape(b, h, w))
            return contexts, maps

        contexts, maps = look(images_BxHxWx1)
        if self.mirror and not train:
            others, mirrored = look(images_BxHxWx1[:, :, ::-1])
            contexts = [(a + b) / 2 for a, b in zip(contexts, others, strict=True)]
            maps = [(a + b[:, :, ::-1]) / 2 for a, b in zip(maps, mirrored, strict=True)]
        embedding = jnp.concatenate(contexts, axis=-1)
        if dropout_keys_B is not None:
            kept = _drop_out(embedding, self.dropout, dropout_keys_B)
            contexts = jnp.split(kept, [contexts[0].shape[-1]], axis=-1)
        if self.combination == 'concat':
            logits = nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name='classifier')(
                jnp.concatenate(contexts, axis=-1)
            )
        else:
            log_p = [
                nn.log_softmax(nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name=f'classifier{i + 1}')(context))
                for i, context in enumerate(contexts)
            ]
            logits = jax.nn.logsumexp(jnp.stack(log_p), axis=0) - jnp.log(len(log_p))
        return Att2Outputs(logits, embedding, (maps[0], maps[1]))


def _drop_out(x_BxC: jax.Array, rate: float, keys_B: jax.Array) -> jax.Array:
    """Returns x with each number set to 0 with probability `rate`, else divided by 1 - rate."""
    keep_BxC = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BxC.shape[1:]))(keys_B)
    return jnp.where(keep_BxC, x_BxC / (1 - rate), 0)


def normalise(images: jax.Array) -> jax.Array:
    """Maps grey values from [0, 255] to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def is_dead(path: str, compatibility: str) -> bool:
    """Says whether the parameter at `path` ('tail_0/conv1/...') cannot change the output of `Att2`."""
    return compatibility not in NEED_GLOBAL_FEATURE and path.startswith('tail_')
