"""ResNet50-ATT2, a ResNet with a tail and two attention modules (the paper's section IV-A), and its light form.

Shapes: B batch, H height, W width, C channels, K classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models import ct_weights
from covidjax.models.attention import LINEAR_INIT, NEED_GLOBAL_FEATURE, ImageAttention
from covidjax.models.efficientnet import HEAD_FEATURES, STAGES, EfficientNetLite0
from covidjax.models.pooled import pool, spread_attention, spread_evidence
from covidjax.models.resnet import BLOCKS, ResNet, stage_features

BACKBONES = ('resnet', 'efficientnet_lite0')
INPUTS = ('imagenet', ct_weights.ASTRA)
# Fine-tuning takes hundreds of steps. ImageNet's 0.99 would let the running statistics lag behind the weights.
_LITE0_MOMENTUM = 0.9
COMBINATIONS = ('concat', 'average')


FEATURES = 'features'  # name among the intermediates: local features of both modules, [B, N, C] or pooled [B, 2, C]


class View(NamedTuple):
    """What the modules find in a slice or its mirror image, a list with an entry for each module.

    Attributes:
      contexts: context vectors [B, C].
      attention: over the positions [B, N], or over mean and maximum [B, 2].
      flat: local features [B, N, C].
      sizes: (h, w) of their maps, N = h * w.
    """

    contexts: list[jax.Array]
    attention: list[jax.Array]
    flat: list[jax.Array]
    sizes: list[tuple[int, int]]


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
      inputs: what the backbone's weights were trained on: 'imagenet', or 'astra' (see `ct_weights`), for which slices
        are turned and get another window on their way in, and features are turned back.
      pooled: True attends to the mean and the maximum of a map in place of its positions (see `pooled`).
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
    inputs: str = 'imagenet'
    pooled: bool = False
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
        self,
        images_BxHxWx1: jax.Array | None,
        *,
        train: bool,
        full: bool = False,
        dropout_keys_B: jax.Array | None = None,
        features: Sequence[Sequence[jax.Array]] | None = None,
    ) -> Att2Outputs:
        """Classifies grey slices.

        Args:
          images_BxHxWx1: float32 in [-1, 1] (see `normalise`); the stem treats it as three equal channels, which
            ImageNet weights expect (see `resnet.StemConv`).
          train: True uses and updates batch statistics (collection 'batch_stats').
          full: True computes the global feature even if it cannot change the output.
          dropout_keys_B: one key per example, so that dropout does not depend on the number of devices. Required if
            `train` and `dropout` > 0; otherwise it must be None.
          features: local features that an earlier call left as the intermediates FEATURES, for the slice and, with
            `mirror`, for its mirror image. They replace the backbone and take part in training as in evaluation.
            Images must then be None, and attention and evidence are ().

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
        channels = self.local_features()[1]
        tail_blocks = self.tail_blocks if self.backbone == 'resnet' else 0
        tail = [BLOCKS[self.block](channels, axis_name=self.axis_name, name=f'tail_{i}') for i in range(tail_blocks)]
        attend = [ImageAttention(self.compatibility, channels, name=f'attention{i + 1}') for i in range(2)]

        def encode(images: jax.Array) -> list[jax.Array]:
            """Returns the local features of both modules, [B, h, w, C] each."""
            if self.inputs == ct_weights.ASTRA:
                maps = backbone(ct_weights.prepare_images(images), train=train)
                return [ct_weights.restore_axes(x) for x in maps[-2:]]
            return backbone(images, train=train)[-2:]

        def attend_to(local: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
            """Returns both modules' context vectors and attentions over the positions of features [B, N, C]."""
            g = None
            if full or self.compatibility in NEED_GLOBAL_FEATURE:
                b, n, c = local[1].shape
                y = local[1].reshape(b, math.isqrt(n), -1, c)
                for block in tail:
                    y = block(y, train=train)
                g = y.mean((1, 2))
            found = [module(x, g) for module, x in zip(attend, local, strict=True)]
            return [context for context, _ in found], [attention for _, attention in found]

        def look(maps: Sequence[jax.Array]) -> View:
            flat = [x.reshape(b, h * w, c) for x in maps for b, h, w, c in [x.shape]]
            local = [pool(x) for x in flat] if self.pooled else flat
            self.sow('intermediates', FEATURES, local)
            contexts, attention = attend_to(local)
            return View(contexts, attention, flat, [x.shape[1:3] for x in maps])

        if features is None and self.mirror and not train and not self.is_initializing():
            views = [look(maps) for maps in split_views(encode(stack_views(images_BxHxWx1)))]
        elif features is None:
            views = [look(encode(images_BxHxWx1))]
        else:
            views = [View(*attend_to(local), [], []) for local in features]
        contexts = [sum(of_module) / len(views) for of_module in zip(*(view.contexts for view in views), strict=True)]
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
        if features is not None:
            return Att2Outputs(logits, embedding, (), ())
        maps, shares = [], []
        for view in views:
            of_modules = list(zip(view.attention, view.flat, view.sizes, weights, strict=True))
            maps.append([_draw_attention(a, x, size, self.pooled) for a, x, size, _ in of_modules])
            shares.append([_draw_evidence(a, x, size, w, self.pooled) for a, x, size, w in of_modules])
        attention, evidence = (
            [average_views(of_module) for of_module in zip(*of_views, strict=True)] for of_views in (maps, shares)
        )
        return Att2Outputs(logits, embedding, tuple(attention), tuple(evidence))


def _draw_attention(a_BxN: jax.Array, x_BxNxC: jax.Array, size: tuple[int, int], is_spread: bool) -> jax.Array:
    """Returns the attention of a module as maps [B, h, w]."""
    return (spread_attention(a_BxN, x_BxNxC) if is_spread else a_BxN).reshape(x_BxNxC.shape[0], *size)


def _draw_evidence(
    a_BxN: jax.Array, x_BxNxC: jax.Array, size: tuple[int, int], w_CxK: jax.Array, is_spread: bool
) -> jax.Array:
    """Returns the evidence of a module as maps [B, h, w, K]."""
    shares = spread_evidence(a_BxN, x_BxNxC, w_CxK) if is_spread else a_BxN[..., None] * (x_BxNxC @ w_CxK)
    return shares.reshape(x_BxNxC.shape[0], *size, w_CxK.shape[-1])


def stack_views(images_BxHxWx1: jax.Array) -> jax.Array:
    """Returns every slice followed by its mirror image, [2 B, H, W, 1]: a network is traced once for both."""
    both = jnp.stack([images_BxHxWx1, images_BxHxWx1[:, :, ::-1]], axis=1)
    return both.reshape(-1, *images_BxHxWx1.shape[1:])


def split_views(arrays: Sequence[jax.Array]) -> list[list[jax.Array]]:
    """Returns arrays [2 B, ...] made from `stack_views` as those of the slices and of the mirror images, [B, ...]."""
    return [[x.reshape(-1, 2, *x.shape[1:])[:, i] for x in arrays] for i in range(2)]


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
