"""COVIDx-SeqCT as a view on prepared slices: scans as lists of record numbers, batched with padding.

What is loaded of a slice is its image, or an embedding that was computed before.

Shapes: B scans, T slices (padded), S side of a slice, N slices of all scans, E embedding, D draws of the augmentation.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from covidjax.data.lists import Row

NUM_SLICES = 16  # of a sequence of the paper


class Scan(NamedTuple):
    """One scan of a split.

    Attributes:
      scan, patient: ids.
      label: class of the scan and of all its slices.
      slices: slice numbers from the file names, ascending.
      records: numbers of the slices' records in the split, in the same order.
    """

    scan: str
    patient: str
    label: int
    slices: tuple[int, ...]
    records: tuple[int, ...]


def group_scans(rows: Sequence[Row]) -> list[Scan]:
    """Returns the scans of a split with all their slices, in the order of their first row.

    A scan id that occurs under two labels gives two scans.
    """
    members: dict[tuple[str, int], list[int]] = {}
    for record, row in enumerate(rows):
        members.setdefault((row.scan, row.label), []).append(record)
    scans = []
    for (scan, label), records in members.items():
        records = sorted(records, key=lambda record: rows[record].slice_index)
        slices = tuple(rows[record].slice_index for record in records)
        scans.append(Scan(scan, rows[records[0]].patient, label, slices, tuple(records)))
    return scans


def thin_evenly(scan: Scan, num_slices: int) -> Scan:
    """Returns the scan reduced to `num_slices` slices, spread evenly from its first to its last.

    Their positions are the rounded values of linspace(0, n - 1, num_slices), n being at least `num_slices`.
    """
    chosen = np.round(np.linspace(0, len(scan.records) - 1, num_slices)).astype(int)
    return scan._replace(slices=tuple(scan.slices[i] for i in chosen), records=tuple(scan.records[i] for i in chosen))


def thin_scans(whole: Sequence[Scan], min_slices: int) -> list[Scan]:
    """Returns scans of at least `min_slices` slices each as they take part.

    Under the paper's protocol, `min_slices` 16, that is 16 slices of each; under a lower limit they stay whole.
    """
    return [thin_evenly(scan, NUM_SLICES) for scan in whole] if min_slices == NUM_SLICES else list(whole)


def pad_length(num_slices: int) -> int:
    """Returns the padded length of a scan: 16, 32, 64, ...; few lengths keep compilations and padding bounded."""
    return max(NUM_SLICES, 1 << (num_slices - 1).bit_length())


def count_batches(scans: Sequence[Scan], batch_size: int) -> int:
    """Returns the number of batches of one pass; scans of one padded length go together."""
    counts = np.unique([pad_length(len(scan.records)) for scan in scans], return_counts=True)[1]
    return int(sum(-(-count // batch_size) for count in counts))


def plan_pass(scans: Sequence[Scan], batch_size: int, rng: np.random.Generator | None) -> list[np.ndarray]:
    """Divides the scans into batches of one padded length each.

    Args:
      scans: of one split.
      batch_size: largest number of scans in a batch.
      rng: shuffles the scans within a length and the order of the batches; None keeps the order of the split.

    Returns:
      For each batch the numbers of its scans.
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
    """Returns step -> (number of its pass, numbers of its scans); every pass is a new permutation of the seed."""
    steps_per_pass = count_batches(scans, batch_size)

    @functools.lru_cache(maxsize=2)
    def plan(number: int) -> list[np.ndarray]:
        return plan_pass(scans, batch_size, np.random.default_rng((seed, number)))

    def plan_step(step: int) -> tuple[int, np.ndarray]:
        number, place = divmod(step, steps_per_pass)
        return number, plan(number)[place]

    return plan_step


def locate_slices(scans: Sequence[Scan]) -> list[slice]:
    """Returns where the slices of each scan stand in an array of all slices, one scan after the other."""
    ends = np.cumsum([len(scan.records) for scan in scans]).tolist()
    return [slice(end - len(scan.records), end) for scan, end in zip(scans, ends, strict=True)]


# (number of the pass, numbers of a batch's scans, B, T) -> what is loaded of their slices, by name
LoadSlices = Callable[[int, np.ndarray, int, int], dict[str, np.ndarray]]


def load_images(source: Sequence[dict], scans: Sequence[Scan]) -> LoadSlices:
    """Returns what loads the slices of scans as 'image' uint8 [B, S, S, T] from the records of their split."""

    def load(_: int, members: np.ndarray, batch_size: int, length: int) -> dict[str, np.ndarray]:
        size = source[scans[0].records[0]]['image'].shape[0]
        images = np.zeros((batch_size, size, size, length), np.uint8)
        for i, member in enumerate(members):
            for t, record in enumerate(scans[member].records):
                images[i, :, :, t] = source[record]['image'][..., 0]
        return {'image': images}

    return load


def load_embeddings(embeddings_DxNxE: np.ndarray, scans: Sequence[Scan]) -> LoadSlices:
    """Returns what loads the slices of scans as 'embedding' float32 [B, T, E], in pass p (from 0) of draw p modulo D.

    `locate_slices` says where the slices of a scan stand.
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
    """Yields batches of scans without end; every pass is a new permutation and takes `count_batches` steps.

    Batch k depends on the arguments and k only; `batch_size` and `shard` are as in `loader.load_train_batches`.

    A batch is a dict: what `load_slices` loads, 0 on padding, 'length' int32 [B] (of T), 'label' int32 [B], 'index'
    int32 [B] (of the scan), 'mask' float32 [B] (0 marks scans that are padding).
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
    """Yields every scan once, in batches as `load_train_scans` and in the order of `plan_pass` without `rng`."""
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
    import grain  # only here: it loads jax, and grouping scans needs neither

    dataset = grain.MapDataset.range(num_batches).map(load)
    # A batch of long scans is hundreds of MB: few are read ahead.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)))
