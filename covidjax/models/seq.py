"""ResNet50-LSTM-ATT2: a frozen slice model, a bidirectional LSTM and attention over the scan (the paper's section V).

Shapes: B scans, T slices (padded), S side of a slice, E embedding, H hidden units of both directions, K classes.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from covidjax.models.att2 import Att2, Att2Outputs
from covidjax.models.attention import LINEAR_INIT

SLICES_AT_ONCE = 64  # batch size of the extractor; bounds its memory for scans of any length


class SeqOutputs(NamedTuple):
    """Outputs of the model for a batch of scans.

    Attributes:
      logits: [B, K], one row per scan.
      attention: [B, T] over the slices of a scan; sums to 1, 0 on padding.
      evidence: [B, T, K], see `HeadOutputs`.
      slice_logits: [B, T, K], the extractor's logits for each slice alone; arbitrary on padding.
    """

    logits: jax.Array
    attention: jax.Array
    evidence: jax.Array
    slice_logits: jax.Array


class HeadOutputs(NamedTuple):
    """Outputs of the part after the extractor.

    Attributes:
      logits: [B, K], one row per scan.
      attention: [B, T] over the slices of a scan; sums to 1, 0 on padding.
      evidence: [B, T, K], e_tc = a_t <w_c, h_t>: the share of slice t in the logit of class c, 0 on padding. The logit
        is bias_c + sum over t of e_tc. The attention averages h_t: in the gated head the embedding of the slice, in the
        other head the state of the LSTM at the slice, which also depends on the other slices.
    """

    logits: jax.Array
    attention: jax.Array
    evidence: jax.Array


def masked_softmax(scores_BxT: jax.Array, mask_BxT: jax.Array) -> jax.Array:
    """Returns the softmax over the positions where the mask is True, and 0 elsewhere; at least float32.

    Every row of the mask needs at least one True.
    """
    scores_BxT = scores_BxT.astype(jnp.promote_types(scores_BxT.dtype, jnp.float32))
    return nn.softmax(jnp.where(mask_BxT, scores_BxT, -jnp.inf), axis=-1)


class GlobalAttention(nn.Module):
    """Attention of the last hidden state over all hidden states: the paper's equations (1) to (4)."""

    @nn.compact
    def __call__(self, h_BxTxH: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the context vector [B, H] and the attentions [B, T]; positions >= lengths_B are padding."""
        width = h_BxTxH.shape[-1]
        last_BxH = jnp.take_along_axis(h_BxTxH, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        g_BxH = nn.tanh(nn.Dense(width, kernel_init=LINEAR_INIT, name='W_g')(last_BxH))
        projected_BxTxH = nn.Dense(width, use_bias=False, kernel_init=LINEAR_INIT, name='W_s')(h_BxTxH)
        scores_BxT = jnp.einsum('bh,bth->bt', g_BxH, projected_BxTxH)
        mask_BxT = jnp.arange(h_BxTxH.shape[1])[None] < lengths_B[:, None]
        attention_BxT = masked_softmax(scores_BxT, mask_BxT)
        return jnp.einsum('bt,bth->bh', attention_BxT, h_BxTxH), attention_BxT


class SequenceClassifier(nn.Module):
    """Bidirectional LSTM, global attention and a linear classifier: equations (1) to (6) and (13) to (17).

    The cell's candidate uses tanh; the sigma in eq. (14) is treated as a misprint.

    Attributes:
      hidden: LSTM units per direction.
      num_classes: K.
    """

    hidden: int = 128
    num_classes: int = 3

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, lengths_B: jax.Array) -> HeadOutputs:
        """Classifies scans; positions >= lengths_B have no influence."""
        dtype = jnp.result_type(float)  # for parameters and carry: float64 only under jax_enable_x64
        forward = nn.RNN(nn.OptimizedLSTMCell(self.hidden, param_dtype=dtype, name='forward'))
        backward = nn.RNN(nn.OptimizedLSTMCell(self.hidden, param_dtype=dtype, name='backward'))
        h_BxTxH = nn.Bidirectional(forward, backward)(x_BxTxE, seq_lengths=lengths_B)
        context_BxH, attention_BxT = GlobalAttention(name='attention')(h_BxTxH, lengths_B)
        classifier = nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name='classifier')
        return HeadOutputs(
            classifier(context_BxH), attention_BxT, compute_slice_evidence(classifier, h_BxTxH, attention_BxT)
        )


class GatedClassifier(nn.Module):
    """Gated attention over slices without recurrence, and a linear classifier (Ilse et al. 2018, eq. 9).

    a_t is the softmax over t of <w, tanh(V x_t + b_V) * sigmoid(U x_t + b_U)>; the context vector is sum_t a_t x_t. The
    order of the slices plays no part.

    Attributes:
      hidden: rows of V and of U.
      num_classes: K.
    """

    hidden: int = 128
    num_classes: int = 3

    @nn.compact
    def __call__(self, x_BxTxE: jax.Array, lengths_B: jax.Array) -> HeadOutputs:
        """Classifies scans; positions from lengths_B on have no influence."""
        signal = nn.tanh(nn.Dense(self.hidden, kernel_init=LINEAR_INIT, name='V')(x_BxTxE))
        gate = nn.sigmoid(nn.Dense(self.hidden, kernel_init=LINEAR_INIT, name='U')(x_BxTxE))
        scores_BxT = nn.Dense(1, use_bias=False, kernel_init=LINEAR_INIT, name='w')(signal * gate)[..., 0]
        mask_BxT = jnp.arange(x_BxTxE.shape[1])[None] < lengths_B[:, None]
        attention_BxT = masked_softmax(scores_BxT, mask_BxT)
        kept_BxTxE = jnp.where(mask_BxT[..., None], x_BxTxE, 0)
        context_BxE = jnp.einsum('bt,bte->be', attention_BxT, kept_BxTxE)
        classifier = nn.Dense(self.num_classes, kernel_init=LINEAR_INIT, name='classifier')
        return HeadOutputs(
            classifier(context_BxE), attention_BxT, compute_slice_evidence(classifier, kept_BxTxE, attention_BxT)
        )


def compute_slice_evidence(classifier: nn.Dense, h_BxTxH: jax.Array, attention_BxT: jax.Array) -> jax.Array:
    """Returns a_t <w_c, h_t>, [B, T, K] (see `HeadOutputs`); the classifier was applied before."""
    return attention_BxT[..., None] * (h_BxTxH @ classifier.variables['params']['kernel'])


HEADS = {'lstm': SequenceClassifier, 'gated': GatedClassifier}  # what follows the extractor


def split_slices(images_BxSxSxT: jax.Array) -> jax.Array:
    """Flattens scans into slices, [B * T, S, S, 1], scan by scan."""
    b, s, _, t = images_BxSxSxT.shape
    return jnp.moveaxis(images_BxSxSxT, -1, 1).reshape(b * t, s, s, 1)


def apply_extractor(model: Att2, variables: dict[str, Any], images_NxSxSx1: jax.Array) -> Att2Outputs:
    """Returns the frozen extractor's outputs for slices in [-1, 1], computed SLICES_AT_ONCE at a time."""

    def apply(images: jax.Array) -> Att2Outputs:
        return model.apply(variables, images, train=False)

    # `jax.lax.map` with a batch size would map single images, which breaks up the products of `fast.conv3x3`.
    whole = len(images_NxSxSx1) // SLICES_AT_ONCE * SLICES_AT_ONCE
    parts = []
    if whole:
        batches = images_NxSxSx1[:whole].reshape(-1, SLICES_AT_ONCE, *images_NxSxSx1.shape[1:])
        parts.append(jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), jax.lax.map(apply, batches)))
    if whole < len(images_NxSxSx1):
        parts.append(apply(images_NxSxSx1[whole:]))
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


class Seq(nn.Module):
    """The paper's ResNet50-LSTM-ATT2 with a frozen extractor.

    The extractor uses its stored batch statistics and gets no gradient. Exclude its parameters from the optimizer too
    (see `is_extractor`): weight decay moves weights even without a gradient.

    Attributes:
      extractor: the slice model.
      hidden: see the class of the head.
      head: one of HEADS.
    """

    extractor: Att2
    hidden: int = 128
    head: str = 'lstm'

    @nn.nowrap
    def create_classifier(self, name: str | None = None) -> SequenceClassifier | GatedClassifier:
        """Returns the part after the extractor; its parameters are stored under 'sequence'."""
        return HEADS[self.head](self.hidden, self.extractor.num_classes, name=name)

    @nn.compact
    def __call__(self, images_BxSxSxT: jax.Array, lengths_B: jax.Array) -> SeqOutputs:
        """Classifies scans.

        Args:
          images_BxSxSxT: float32 in [-1, 1], the slices of a scan in anatomical order along the last axis.
          lengths_B: int32 number of slices, at least 1; slices after that are padding with any content.
        """
        b, _, _, t = images_BxSxSxT.shape
        slices = split_slices(images_BxSxSxT)
        if self.is_initializing():
            outputs = self.extractor(slices, train=False, full=True)
        else:
            outputs = apply_extractor(self.extractor.clone(parent=None), self.extractor.variables, slices)
        embeddings = jax.lax.stop_gradient(outputs.embedding).reshape(b, t, -1)
        head = self.create_classifier('sequence')(embeddings, lengths_B)
        return SeqOutputs(*head, jax.lax.stop_gradient(outputs.logits).reshape(b, t, -1))


def is_extractor(path: str) -> bool:
    """Returns whether the parameter at `path` ('extractor/backbone/...') belongs to the frozen extractor."""
    return path.startswith('extractor/')
