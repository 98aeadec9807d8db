"""ResNet50-ATT2, a ResNet with a tail and two attention modules (the paper's section IV-A), and its light form.

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
# Fine-tuning takes hundreds of steps. ImageNet's 0.99 would let the running statistics lag behind the weights.
_LITE0_MOMENTUM = 0.9
COMBINATIONS = ('concat', 'average')


class Att2Outputs(NamedTuple):
    """Outputs of the model for a batch of slices.

    Attributes:
      logits: [B, K] float32.
      embedding: [B, C1 + C2] context vectors of both modules, before dropout; 3072 wide in the paper.
      attention: one map per module, [B, h, w]; each map sums to 1. 14x14 and 7x7 at 224 px.
      evidence: per module [B, h, w, K], e_ic = a_i <w_c, x_i>: the share of position i in the logit of class c, with
        attention a_i, local feature x_i and the module's part w_c of the classifier. Positive for the class, negative
        against it. With 'concat' the shares are exact: logit_c = bias_c + sum of e_ic over the positions of both
        modules. With 'average' this holds for each module's own logit. Dropout is left out.
    """

    logits: jax.Array
    embedding: jax.Array
    attention: tuple[jax.Array, jax.Array]
    evidence: tuple[jax.Array, jax.Array]


class Att2(nn.Module):
    """ResNet with attention after its last two stages; the defaults give the paper's ResNet50-ATT2.

    The tail is `tail_blocks` stride-1 blocks after the last stage. The average of its output over the map is the global
    feature g. With 'additive' compatibility g cancels (see `attention.ImageAttention`), and 'uniform' does not use g.
    The tail is then dead weight: 13,387,776 of the paper's parameters. It stays in the parameter tree (59 layers,
    parity, export), but is not computed and its batch statistics are not updated unless `full=True`. Initialise with
    `full=True` to create it.

    The backbone 'efficientnet_lite0' has local features of 112 and 1280 channels, on maps of the same size as the
    ResNet's. It has no tail: the global feature is the average of the last features over the map.

    Attributes:
      stage_sizes, width, block, stem: see `resnet.ResNet`; ResNet only.
      axis_name: see `resnet.ResNet`.
      tail_blocks: number of blocks in the tail; ResNet only.
      num_classes: K.
      compatibility: 'additive' (eq. 11), 'dot' (eq. 12), 'tanh' or 'uniform' (average pooling).
      combination: 'concat' (one classifier on both context vectors) or 'average' (one each, probabilities averaged).
      backbone: one of BACKBONES.
      dropout: share of the embedding that is set to 0 in training; the rest is scaled up.
      mirror: True averages the context vectors of a slice and of its mirror image in evaluation, and their attention
        and evidence maps after mirroring back. The shares stay exact. Takes twice the time.
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
        """Returns the channels of both attention modules' local features; the embedding has their sum."""
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
          images_BxHxWx1: float32 in [-1, 1] (see `normalise`); the stem treats it as three equal channels, which
            ImageNet weights expect (see `resnet.StemConv`).
          train: True uses and updates batch statistics (collection 'batch_stats').
          full: True computes the global feature even if it cannot change the output.
          dropout_keys_B: one key per example, so that dropout does not depend on the number of devices. Required if
            `train` and `dropout` > 0; otherwise it must be None.

        Raises:
          ValueError: unknown backbone or combination; dropout keys are missing or not needed.
        """
        if self.backbone not in BACKBONES:
            raise ValueError(f'backbone must be one of {BACKBONES}, got {self.backbone!r}')
        if self.combination not in COMBINATIONS:
            raise ValueError(f'combination must be one of {COMBINATIONS}, got {self.combination!r}')
        if (dropout_keys_B is not None) != (train and self.dropout > 0):
            given = 'no' if dropout_keys_B is None else 'some'
            raise ValueError(f'got {given} dropout keys with train={train} and dropout={self.dropout}')
        if self.backbone == 'resnet':
            backbone = ResNet(self.stage_sizes, self.width, self.block, self.stem, self.axis_name, name='backbone')
        else:
            backbone = EfficientNetLite0(momentum=_LITE0_MOMENTUM, axis_name=self.axis_name, name='backbone')
        features = self.local_features()[1]
        tail_blocks = self.tail_blocks if self.backbone == 'resnet' else 0
        tail = [BLOCKS[self.block](features, axis_name=self.axis_name, name=f'tail_{i}') for i in range(tail_blocks)]
        attend = [ImageAttention(self.compatibility, features, name=f'attention{i + 1}') for i in range(2)]

        def look(images: jax.Array) -> tuple[list[jax.Array], list[jax.Array], list[jax.Array]]:
            """Returns both modules' context vectors, attention maps and local features."""
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
            return contexts, maps, [x1, x2]

        views = [look(images_BxHxWx1)]
        if self.mirror and not train:
            views.append(look(images_BxHxWx1[:, :, ::-1]))
        contexts = [sum(of_module) / len(views) for of_module in zip(*(view[0] for view in views), strict=True)]
        embedding = jnp.concatenate(contexts, axis=-1)
        if dropout_keys_B is not None:
            kept = _drop_out(embedding, self.dropout, dropout_keys_B)
            contexts = jnp.split(kept, [contexts[0].shape[-1]], axis=-1)
        if self.combination == 'concat':
            classifier = nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name='classifier')
            logits = classifier(jnp.concatenate(contexts, axis=-1))
            weights = jnp.split(classifier.variables['params']['kernel'], [contexts[0].shape[-1]])
        else:
            classifiers = [
                nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name=f'classifier{i + 1}') for i in range(2)
            ]
            log_p = [nn.log_softmax(apply(context)) for apply, context in zip(classifiers, contexts, strict=True)]
            logits = jax.nn.logsumexp(jnp.stack(log_p), axis=0) - jnp.log(len(log_p))
            weights = [classifier.variables['params']['kernel'] for classifier in classifiers]
        attention = [average_views(of_module) for of_module in zip(*(maps for _, maps, _ in views), strict=True)]
        shares = [
            [a[..., None] * (x @ w) for a, x, w in zip(maps, features, weights, strict=True)]
            for _, maps, features in views
        ]
        evidence = [average_views(of_module) for of_module in zip(*shares, strict=True)]
        return Att2Outputs(logits, embedding, tuple(attention), tuple(evidence))


def average_views(maps: Sequence[jax.Array]) -> jax.Array:
    """Returns the mean of the maps [B, h, w, ...] of a slice and, if there, of its mirror image, mirrored back."""
    return maps[0] if len(maps) == 1 else (maps[0] + maps[1][:, :, ::-1]) / 2


def _drop_out(x_BxC: jax.Array, rate: float, keys_B: jax.Array) -> jax.Array:
    """Sets each number of x to 0 with probability `rate`; divides the others by 1 - rate."""
    keep_BxC = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x_BxC.shape[1:]))(keys_B)
    return jnp.where(keep_BxC, x_BxC / (1 - rate), 0)


def normalise(images: jax.Array) -> jax.Array:
    """Maps grey values from [0, 255] to float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def is_dead(path: str, compatibility: str) -> bool:
    """Returns whether the parameter at `path` ('tail_0/conv1/...') cannot change the output of `Att2`."""
    return compatibility not in NEED_GLOBAL_FEATURE and path.startswith('tail_')
