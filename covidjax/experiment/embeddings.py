"""Cached embeddings of scans: a frozen extractor computes them once instead of in every epoch.

A fixed number of augmentations is drawn for each scan, and the epochs use them in turn. Training then computes only the
part after the extractor.

Shapes: D draws, N slices of all scans one after the other, T slices of a scan, S side of a slice, E embedding.
"""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from covidjax.data import sequences
from covidjax.data.sequences import Scan
from covidjax.errors import UserError
from covidjax.models.att2 import Att2
from covidjax.models.fast import compile_fast
from covidjax.models.seq import apply_extractor, split_slices
from covidjax.progress import track
from covidjax.training.augment import Augmentation
from covidjax.training.devices import get_shard, pad_batch_size, place_batch, replicate
from covidjax.training.hosts import is_first
from covidjax.training.step import cast, prepare_images

log = logging.getLogger(__name__)

_PURPOSE = np.uint32(2**32 - 1)  # folded into the root key of a run; no step number is this large


def run_pass(
    apply: Callable[[dict], Any], batches: Iterator[dict], chosen: Sequence[Scan], batch_size: int
) -> Iterator[tuple[int, Any]]:
    """Yields (scan number, outputs of `apply`) for every scan.

    Each process loads its share of the scans of a batch and gets the outputs of all of them.

    Args:
      apply: batch on the devices -> a tree of replicated arrays [B, ...].
      batches: this process's rows of all batches, in the order of `sequences.plan_pass` without `rng`.
      chosen: the scans.
      batch_size: scans per batch, over all processes.
    """
    for members, batch in zip(sequences.plan_pass(chosen, batch_size, None), batches, strict=True):
        outputs = jax.device_get(apply(place_batch(batch)))
        for i, member in enumerate(members.tolist()):
            yield member, jax.tree.map(lambda leaf, i=i: leaf[i], outputs)


@functools.partial(compile_fast, static_argnums=(0, 5, 6))
def _embed(
    model: Att2,
    variables: dict[str, Any],
    batch: dict[str, jax.Array],
    key: jax.Array | None,
    draw: int,
    augmentation: Augmentation | None,
    dtype: str,
) -> jax.Array:
    """Returns the embeddings [B, T, E] under one draw, by the computation of `train_step` up to there."""
    keys_B = None
    if augmentation is not None:
        draw_key = jax.random.fold_in(jax.random.fold_in(key, _PURPOSE), draw)
        keys_B = jax.vmap(functools.partial(jax.random.fold_in, draw_key))(batch['index'])
    images = cast(prepare_images(batch['image'], keys_B, augmentation), dtype)
    variables = {**variables, 'params': cast(variables['params'], dtype)}
    embeddings = apply_extractor(model, variables, split_slices(images)).embedding
    return replicate(embeddings.reshape(len(images), images.shape[-1], -1).astype('float32'))


def compute_embeddings(
    model: Att2,
    variables: dict[str, Any],
    source: Sequence[dict],
    chosen: Sequence[Scan],
    *,
    key: jax.Array | None,
    augmentation: Augmentation | None,
    num_draws: int,
    dtype: str,
    batch_size: int,
    title: str,
) -> np.ndarray:
    """Returns the embeddings of all slices of all scans, float32 [D, N, E], in every process.

    A draw depends only on `key`, the scan number and the draw number.

    Args:
      model, variables: the frozen extractor.
      source: records of the scans' split.
      chosen: the scans, with the slices that are used.
      key: root key of the run; may be None where there is no augmentation.
      augmentation: None leaves the images as they are.
      num_draws: D.
      dtype: dtype of the activations, as in `train_step`.
      batch_size: scans per batch.
      title: title of the progress bar.

    Raises:
      UserError: the embeddings do not fit into memory.
    """
    places, batch_size = sequences.locate_slices(chosen), pad_batch_size(batch_size)
    shape = (num_draws, places[-1].stop, sum(model.local_features()))
    size = f'{np.prod(shape, dtype=float) * 4 / 1e6:,.0f} MB of memory in every process'
    try:
        embeddings_DxNxE = np.zeros(shape, np.float32)
    except MemoryError as error:
        raise UserError(
            f'{title}, {num_draws} draws, need {size}: pass a lower --config.data.cached_draws, or 0'
        ) from error
    log.info('%s, %d draws: %s', title, num_draws, size)

    def apply(batch: dict[str, jax.Array]) -> list[jax.Array]:
        return [_embed(model, variables, batch, key, draw, augmentation, dtype) for draw in range(num_draws)]

    load_slices = sequences.load_images(source, chosen)
    batches = sequences.load_eval_scans(load_slices, chosen, batch_size=batch_size, shard=get_shard())
    found = run_pass(apply, batches, chosen, batch_size)
    for member, draws in track(found, title, len(chosen), 'scan', is_shown=is_first()):
        for draw, embeddings_TxE in enumerate(draws):
            t = len(chosen[member].records)
            embeddings_DxNxE[draw, places[member]] = embeddings_TxE[:t]
    return embeddings_DxNxE
