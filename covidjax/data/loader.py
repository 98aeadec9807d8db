"""Batches of prepared slices: an endless shuffled stream for training, one padded pass for evaluation.

A batch is a dict: 'image' uint8 [B, S, S, 1], 'label' int32 [B], 'index' int32 [B] (the record's number in its split),
'mask' float32 [B] (0 marks padding).
"""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

# Batches read ahead, by threads: decoding PNG leaves Python's lock. Grain's default would hold 500 of them.
READ_AHEAD = grain.ReadOptions(num_threads=8, prefetch_buffer_size=16)


class _Records(grain.sources.RandomAccessDataSource):
    """Prepared records with their number, reduced to what a batch holds."""

    def __init__(self, source: Sequence[dict]):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        record = self._source[index]
        return {
            'image': record['image'],
            'label': np.int32(record['label']),
            'index': np.int32(index),
            'mask': np.float32(1),
        }


def load_train_batches(source: Sequence[dict], *, batch_size: int, seed: int, first_step: int) -> Iterator[dict]:
    """Yields batches without end; every pass over the records is shuffled anew.

    Batch k depends on (source, batch_size, seed, k) only: a stream that starts at `first_step` goes on exactly where
    an interrupted one stopped.
    """
    dataset = grain.MapDataset.source(_Records(source)).seed(seed).shuffle().repeat().batch(batch_size)
    iterator = iter(dataset.to_iter_dataset(READ_AHEAD))
    iterator.set_state({'next_index': first_step})
    return iterator


def load_eval_batches(source: Sequence[dict], *, batch_size: int) -> Iterator[dict]:
    """Yields every record once, in order; the last batch is padded with zeros (mask 0)."""
    dataset = grain.MapDataset.source(_Records(source)).batch(batch_size)
    for batch in dataset.to_iter_dataset(READ_AHEAD):
        missing = batch_size - len(batch['mask'])
        yield {
            name: np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
            for name, array in batch.items()
        }
