"""Fixed splits of patients for masked data that come without them."""

import hashlib
from collections.abc import Iterable, Sequence


def split_by_source(patients: Sequence[str], sources: Sequence[str], *, with_test: bool) -> list[str]:
    """Returns the split of every row: `split_patients` for the patients of each source."""
    splits = {
        source: split_patients((p for p, other in zip(patients, sources, strict=True) if other == source), with_test)
        for source in dict.fromkeys(sources)
    }
    return [splits[source][patient] for patient, source in zip(patients, sources, strict=True)]


def split_patients(patients: Iterable[str], with_test: bool) -> dict[str, str]:
    """Returns the split of every patient: 'train', 'val' or 'test'.

    The patients are sorted by the SHA-256 of their ID. With `with_test`, the first fifth is test, the second fifth
    validation, the rest training; otherwise the first fifth is validation. A fifth is rounded and has at least one
    patient; it is left to training if nobody else would be there. The order of `patients` does not matter.

    Args:
      patients: patient IDs.
      with_test: also make a test part.
    """
    order = sorted(set(patients), key=lambda patient: hashlib.sha256(patient.encode()).digest())
    fifth = max(1, round(len(order) / 5))
    splits = dict.fromkeys(order, 'train')
    for number, part in enumerate(['test', 'val'] if with_test else ['val']):
        start, stop = number * fifth, (number + 1) * fifth
        if stop < len(order):
            splits.update(dict.fromkeys(order[start:stop], part))
    return splits
