"""Features of a frozen backbone: computed once for each slice and kept on disk in half precision.

Runs, folds and datasets share them: a row is found by the pixels of its slice, and a folder belongs to one backbone. An
interrupted computation goes on where it ended.

Shapes: B batch, N positions of a map, C channels, E numbers per slice: both modules' features, of the slice and with
`mirror` of its mirror image, flat.
"""

import functools
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import jax
import jax.numpy as jnp
import numpy as np

from covidjax.data.covidx_ct import Prepared
from covidjax.evaluation.outputs import apply_in_batches
from covidjax.files import report_write_errors
from covidjax.models.att2 import FEATURES, Att2, normalise
from covidjax.models.fast import compile_fast
from covidjax.models.folding import fold_batch_norm
from covidjax.progress import track
from covidjax.training.hosts import is_first

log = logging.getLogger(__name__)

MAX_BYTES = 20 * 10**9  # of the features of a run; beyond, only mean and maximum of every map are kept
BATCH_SIZE = 16
_FORMAT = b'1'  # raise it when the same backbone and pixels give other rows

Shapes = tuple[tuple[int, int], ...]  # (N, C) of both modules


def list_shapes(model: Att2, image_size: int) -> Shapes:
    """Returns the shapes of both modules' features for one view of a slice."""
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 1), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False, full=True), images)
    return tuple(x.shape[1:] for x in jax.eval_shape(lambda v, x: _compute(model, v, x), variables, images)[0])


def count_bytes(model: Att2, image_size: int) -> int:
    """Returns the size of a slice's features in half precision."""
    return 2 * _count_views(model) * sum(map(math.prod, list_shapes(model, image_size)))


def unpack(features_BxE: jax.Array, shapes: Shapes, model: Att2) -> list[list[jax.Array]]:
    """Returns features as `Att2` takes them: for every view both modules' [B, N, C], float32."""
    ends = np.cumsum([math.prod(shape) for _ in range(_count_views(model)) for shape in shapes])[:-1].tolist()
    parts = iter(jnp.split(features_BxE.astype(jnp.float32), ends, axis=1))
    return [[next(parts).reshape(-1, *shape) for shape in shapes] for _ in range(_count_views(model))]


class KeptFeatures(NamedTuple):
    """Records of a split with 'embedding', float16 [E], in place of the image.

    Attributes:
      features: all rows of the folder, [R, E], read from disk on demand.
      places: row of every record.
      labels: class of every record.
    """

    features: np.ndarray
    places: np.ndarray
    labels: Sequence[int]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {'embedding': np.array(self.features[self.places[index]]), 'label': self.labels[index]}


def keep_features(model: Att2, variables: dict[str, Any], image_size: int, data: Prepared, split: str) -> KeptFeatures:
    """Returns the features of a split's slices; computes those that are not on disk.

    They are in the folder `covidjax_features` beside the prepared slices. Processes of one host wait for each other.

    Args:
      model, variables: the slice model; only its backbone matters.
      image_size: side of the slices in pixels.
      data: the slices.
      split: its split.

    Raises:
      UserError: the folder can't be written, or the disk is full.
    """
    source = data.sources[split]
    num_bytes = count_bytes(model, image_size)
    row = np.dtype([('digest', 'V32'), ('features', '<f2', (num_bytes // 2,))])
    parent = Path(data.path).parents[2] / 'covidjax_features'
    folder = parent / f'{model.backbone}_{image_size}px_{_compute_key(model, variables)[:16]}'
    digests = [hashlib.sha256(source[i]['image'].tobytes()).digest() for i in range(len(source))]
    with report_write_errors(parent, '--config.data.prepared_dir'):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / 'features.bin'
        with filelock.FileLock(folder / 'lock'):
            known = _read_digests(path, row)
            missing = [
                i for digest, i in {digest: i for i, digest in enumerate(digests)}.items() if digest not in known
            ]
            log.info(
                'features of %s: %d slices of %.2f MB each, %d to compute; kept in %s',
                split,
                len(source),
                num_bytes / 1e6,
                len(missing),
                folder,
            )
            _append(path, row, _compute_rows(model, variables, source, missing, split), [digests[i] for i in missing])
            known = _read_digests(path, row)
            features = np.memmap(path, row, 'r')['features']
    labels = [entry.label for entry in data.rows[split]]
    return KeptFeatures(features, np.array([known[digest] for digest in digests]), labels)


def _count_views(model: Att2) -> int:
    return 2 if model.mirror else 1


def _compute(model: Att2, variables: dict[str, Any], images_BxSxSx1: jax.Array) -> tuple[list[jax.Array], ...]:
    """Returns both modules' features of every view, for images in [-1, 1]."""
    _, found = model.apply(variables, images_BxSxSx1, train=False, mutable=['intermediates'])
    return found['intermediates'][FEATURES]


# Defined here, so that the splits share one compilation.
@functools.partial(compile_fast, static_argnums=0)
def _apply(model: Att2, variables: dict[str, Any], images_BxSxSx1: jax.Array) -> jax.Array:
    views = _compute(model, variables, normalise(images_BxSxSx1))
    parts = [x.reshape(len(x), -1) for view in views for x in view]
    return jnp.concatenate(parts, axis=1).astype(jnp.float16)


def _compute_rows(
    model: Att2, variables: dict[str, Any], source: Sequence[dict], numbers: Sequence[int], title: str
) -> Iterator[np.ndarray]:
    """Yields the features float16 [E] of the given records."""
    apply = functools.partial(_apply, model, fold_batch_norm(variables))

    def compute() -> Iterator[np.ndarray]:
        for start in range(0, len(numbers), BATCH_SIZE):
            images = np.stack([source[i]['image'] for i in numbers[start : start + BATCH_SIZE]])
            yield from apply_in_batches(apply, BATCH_SIZE, images)

    yield from track(compute(), f'features of {title}', len(numbers), 'slice', is_shown=is_first())


def _compute_key(model: Att2, variables: dict[str, Any]) -> str:
    """Returns the SHA-256, in hex, of all that the features depend on besides the slice."""
    fields = ('backbone', 'stage_sizes', 'width', 'block', 'stem', 'mirror', 'inputs', 'pooled')
    digest = hashlib.sha256(_FORMAT + repr([getattr(model, field) for field in fields]).encode())
    for collection in sorted(variables):
        flat = jax.tree_util.tree_leaves_with_path(jax.device_get(variables[collection]['backbone']))
        for path, leaf in flat:
            digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _read_digests(path: Path, row: np.dtype) -> dict[bytes, int]:
    """Returns the row of every slice in the file; cuts off a row that was not written to its end."""
    if not path.exists():
        return {}
    count, rest = divmod(path.stat().st_size, row.itemsize)
    if rest:
        with path.open('r+b') as file:
            file.truncate(count * row.itemsize)
    return {bytes(digest): i for i, digest in enumerate(np.memmap(path, row, 'r')['digest'])} if count else {}


def _append(path: Path, row: np.dtype, rows: Iterator[np.ndarray], digests: Sequence[bytes]) -> None:
    with path.open('ab') as file:
        for features, digest in zip(rows, digests, strict=True):
            entry = np.zeros((), row)
            entry['digest'], entry['features'] = np.void(digest), features
            file.write(entry.tobytes())
            file.flush()
