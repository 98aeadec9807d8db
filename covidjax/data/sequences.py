"""COVIDx-SeqCT: scans as lists of record numbers of prepared slices, batched with padding.

A batch holds either the images of the slices or embeddings computed earlier.

Shapes: B scans, T slices (padded), S side of a slice, N slices of all scans, E embedding size, D augmentation draws.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from covidjax.data.lists import Row

NUM_SLICES = 16  # per sequence, as in the paper


class Scan(NamedTuple):
    """One scan of a split.

    Attributes:
      scan, patient: IDs.
      label: class of the scan and all its slices.
      slices: slice numbers from the file names, ascending.
      records: record number of each slice in the split, in the same order.
      source: see `lists.Row`.
    """

    scan: str
    patient: str
    label: int
    slices: tuple[int, ...]
    records: tuple[int, ...]
    source: str = ''


def group_scans(rows: Sequence[Row]) -> list[Scan]:
    """Groups the rows of a split into scans, in the order of their first row.

    A scan ID with two labels gives two scans.
    """
    members: dict[tuple[str, int], list[int]] = {}
    for record, row in enumerate(rows):
        members.setdefault((row.scan, row.label), []).append(record)
    scans = []
    for (scan, label), records in members.items():
        records = sorted(records, key=lambda record: rows[record].slice_index)
        slices = tuple(rows[record].slice_index for record in records)
        first = rows[records[0]]
        scans.append(Scan(scan, first.patient, label, slices, tuple(records), first.source))
    return scans


def thin_evenly(scan: Scan, num_slices: int) -> Scan:
    """Returns the scan with `num_slices` evenly spaced slices, including its first and last.

    The positions are round(linspace(0, n - 1, num_slices)) for a scan of n >= num_slices slices.
    """
    chosen = np.round(np.linspace(0, len(scan.records) - 1, num_slices)).astype(int)
    return scan._replace(slices=tuple(scan.slices[i] for i in chosen), records=tuple(scan.records[i] for i in chosen))


def thin_scans(whole: Sequence[Scan], min_slices: int) -> list[Scan]:
    """Applies the slice selection of a run to scans with at least `min_slices` slices each.

    For `min_slices` 16, the paper's protocol, each scan is reduced to 16 slices. For lower values scans stay whole.
    """
    return [thin_evenly(scan, NUM_SLICES) for scan in whole] if min_slices == NUM_SLICES else list(whole)


def pad_length(num_slices: int) -> int:
    """Returns the padded length of a scan: 16, 32, 64, ... Powers of two limit both recompilation and padding."""
    return max(NUM_SLICES, 1 << (num_slices - 1).bit_length())


def count_batches(scans: Sequence[Scan], batch_size: int) -> int:
    """Returns the number of batches in one pass. All scans of a batch have the same padded length."""
    counts = np.unique([pad_length(len(scan.records)) for scan in scans], return_counts=True)[1]
    return int(sum(-(-count // batch_size) for count in counts))


def plan_pass(scans: Sequence[Scan], batch_size: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Divides scans into batches so that all scans of a batch have the same padded length.

    Args:
      scans: scans of one split.
      batch_size: maximum number of scans in a batch.
      rng: shuffles the scans of each length and the batches; None keeps the order of the split within each length.

    Returns:
      The scan numbers of each batch.
    """
    lengths = np.array([pad_length(len(scan.records)) for scan in scans])
    batches = []
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        if rng is not None:
            rng.shuffle(members)
        batches += np.split(members, range(batch_size, len(members), batch_size))
    if rng is not None:
        batches = [batches[i] for i in rng.permutation(len(batches))]
    return batches


def plan_steps(scans: Sequence[Scan], batch_size: int, seed: int) -> Callable[[int], tuple[int, np.ndarray]]:
    """Returns a function step -> (pass number, scan numbers). The order of a pass depends on (seed, pass number)."""
    steps_per_pass = count_batches(scans, batch_size)

    @functools.lru_cache(maxsize=2)
    def plan(number: int) -> list[np.ndarray]:
        return plan_pass(scans, batch_size, np.random.default_rng((seed, number)))

    def plan_step(step: int) -> tuple[int, np.ndarray]:
        number, place = divmod(step, steps_per_pass)
        return number, plan(number)[place]

    return plan_step


def locate_slices(scans: Sequence[Scan]) -> list[slice]:
    """Returns the range of each scan in an array of all slices, scan after scan."""
    ends = np.cumsum([len(scan.records) for scan in scans]).tolist()
    return [slice(end - len(scan.records), end) for scan, end in zip(scans, ends, strict=True)]


# (pass number, scan numbers of a batch, B, T) -> arrays of their slices, by name
LoadSlices = Callable[[int, np.ndarray, int, int], dict[str, np.ndarray]]


def load_images(source: Sequence[dict], scans: Sequence[Scan]) -> LoadSlices:
    """Returns a function that loads slices as 'image' uint8 [B, S, S, T] from `source`, the records of the split."""

    def load(_: int, members: np.ndarray, batch_size: int, length: int) -> dict[str, np.ndarray]:
        size = source[scans[0].records[0]]['image'].shape[0]
        images = np.zeros((batch_size, size, size, length), np.uint8)
        for i, member in enumerate(members):
            for t, record in enumerate(scans[member].records):
                images[i, :, :, t] = source[record]['image'][..., 0]
        return {'image': images}

    return load


def load_embeddings(embeddings_DxNxE: np.ndarray, scans: Sequence[Scan]) -> LoadSlices:
    """Returns a function that loads slices as 'embedding' float32 [B, T, E]. Pass p (from 0) uses draw p modulo D.

    The slices of a scan are at `locate_slices(scans)` along N.
    """
    places = locate_slices(scans)

    def load(number: int, members: np.ndarray, batch_size: int, length: int) -> dict[str, np.ndarray]:
        draw_NxE = embeddings_DxNxE[number % len(embeddings_DxNxE)]
        embeddings = np.zeros((batch_size, length, draw_NxE.shape[1]), np.float32)
        for i, member in enumerate(members):
            embeddings[i, : len(scans[member].records)] = draw_NxE[places[member]]
        return {'embedding': embeddings}

    return load


def load_train_scans(
    load_slices: LoadSlices,
    scans: Sequence[Scan],
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[dict]:
    """Yields batches of scans without end. Every pass is a new permutation and takes `count_batches` steps.

    Batch k depends only on the arguments and k, so you can resume at any step. `batch_size` and `shard` are as in
    `loader.load_train_batches`.

    A batch is a dict: the arrays of `load_slices` (0 on padding), 'length' int32 [B] (slices per scan), 'label' int32
    [B], 'index' int32 [B] (scan number), 'mask' float32 [B] (0 marks padding scans).
    """
    plan = plan_steps(scans, batch_size, seed)

    def load(step: int) -> dict:
        return _load_batch(*plan(step), scans, load_slices, batch_size, shard)

    stream = _stream(load, np.iinfo(np.int32).max)
    stream.set_state({'next_index': first_step})
    return stream


def load_eval_scans(
    load_slices: LoadSlices, scans: Sequence[Scan], *, batch_size: int, shard: tuple[int, int] = (0, 1)
) -> Iterator[dict]:
    """Yields every scan once, in the batches of `plan_pass` without `rng`; the dict is as in `load_train_scans`."""
    plan = plan_pass(scans, batch_size, None)
    return _stream(lambda k: _load_batch(0, plan[k], scans, load_slices, batch_size, shard), len(plan))


def _load_batch(
    number: int,
    members: np.ndarray,
    scans: Sequence[Scan],
    load_slices: LoadSlices,
    batch_size: int,
    shard: tuple[int, int],
) -> dict:
    length = pad_length(len(scans[members[0]].records))
    process, num_processes = shard
    batch_size //= num_processes
    members = members[process * batch_size : (process + 1) * batch_size]
    batch = {
        **load_slices(number, members, batch_size, length),
        'length': np.ones(batch_size, np.int32),
        'label': np.zeros(batch_size, np.int32),
        'index': np.zeros(batch_size, np.int32),
        'mask': np.zeros(batch_size, np.float32),
    }
    for i, member in enumerate(members):
        batch['length'][i], batch['label'][i] = len(scans[member].records), scans[member].label
        batch['index'][i], batch['mask'][i] = member, 1
    return batch


def _stream(load: Callable[[int], dict], num_batches: int) -> Iterator[dict]:
    import grain  # grain imports jax; grouping scans needs neither

    dataset = grain.MapDataset.range(num_batches).map(load)
    # Read few batches ahead: a batch of long scans has hundreds of MB.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
