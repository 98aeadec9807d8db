"""Batches of prepared slices: an endless shuffled stream for training, one padded pass for evaluation.

A batch is a dict: 'image' uint8 [B, S, S, 1], 'index' int32 [B] (record number in the split), 'mask' float32 [B] (0
marks padding), and what else the records hold: 'label' int32 [B], or 'masks' and 'known' (see `masked.read_masked`).
Records may hold 'embedding' [E] instead of 'image'.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from covidjax.data.balance import Stratum

if TYPE_CHECKING:
    import grain

# Columns of a record that batches hold, with their dtypes; others are names.
_INPUTS = {'image': np.asarray, 'embedding': np.asarray, 'label': np.int32, 'masks': np.asarray, 'known': np.uint8}


class _Records:
    """Prepared records as the items of a batch, with their number and a mask.

    Args:
      source: records of a split.
      numbers: of the records to use; all by default.
    """

    def __init__(self, source: Sequence[dict], numbers: Sequence[int] | None = None):
        self._source = source
        self._numbers = range(len(source)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = self._numbers[index]
        record = self._source[index]
        inputs = {name: convert(record[name]) for name, convert in _INPUTS.items() if name in record}
        return {**inputs, 'index': np.int32(index), 'mask': np.float32(1)}


def load_train_batches(
    source: Sequence[dict],
    *,
    batch_size: int,
    seed: int,
    first_step: int,
    shard: tuple[int, int] = (0, 1),
    strata: Sequence[Stratum] = (),
) -> Iterator[dict]:
    """Yields batches without end and reshuffles the records in every pass.

    Batch k depends only on (source, strata, batch_size, seed, k): to resume an interrupted stream, pass its next step
    as `first_step`.

    Args:
      source: records of a split.
      batch_size: global batch size B, over all processes.
      seed: seed of the order.
      first_step: number of the first batch.
      shard: (p, P), process p of P, yields the rows [p B / P, (p + 1) B / P) of every batch; P divides B.
      strata: groups of records that take turns by their shares, each reshuffled in its own passes; none: all records
        are one group.
    """
    import grain  # see `_read_ahead`

    process, num_processes = shard
    groups = [stratum.records for stratum in strata] or [None]
    streams = [
        grain.MapDataset.source(_Records(source, group)).seed(seed + number).shuffle().repeat()
        for number, group in enumerate(groups)
    ]
    records = grain.MapDataset.mix(streams, [stratum.share for stratum in strata]) if strata else streams[0]
    dataset = records.batch(batch_size // num_processes)[process::num_processes]
    iterator = _read_ahead(dataset)
    iterator.set_state({'next_index': first_step})
    return iterator


def load_eval_batches(source: Sequence[dict], *, batch_size: int, shard: tuple[int, int] = (0, 1)) -> Iterator[dict]:
    """Yields every record once, in order. The last batch is padded with zeros (mask 0).

    `batch_size` and `shard` are as in `load_train_batches`. All processes yield the same number of batches.
    """
    import grain  # see `_read_ahead`

    process, num_processes = shard
    records, rows = _Records(source), batch_size // num_processes
    empty = {name: np.zeros((rows, *np.shape(value)), np.asarray(value).dtype) for name, value in records[0].items()}

    def load(number: int) -> dict[str, np.ndarray]:
        batch = {name: array.copy() for name, array in empty.items()}
        first = number * batch_size + process * rows
        for row, index in enumerate(range(first, min(first + rows, len(records)))):
            for name, value in records[index].items():
                batch[name][row] = value
        return batch

    num_batches = -(-len(records) // batch_size)
    return _read_ahead(grain.MapDataset.range(num_batches).map(load))


def _read_ahead(dataset: 'grain.MapDataset') -> 'grain.DatasetIterator':
    """Iterates over a dataset and reads ahead; grain is imported late because predictions need none."""
    import grain

    # Threads suffice because PNG decoding releases the GIL. Grain's default buffers 500 batches.
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)))
