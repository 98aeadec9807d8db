"""Identifies the published version and draft of a set of lists by its class counts."""

import numpy as np

from covidjax.audit.check import LOOK, OK, Check, join_words
from covidjax.audit.dataset import Dataset
from covidjax.data.lists import CLASSES, SPLITS
from covidjax.data.published import SLICES
from covidjax.report.page import Table


def count_classes(labels: np.ndarray) -> tuple[int, ...]:
    """Returns the number of examples of each class."""
    return tuple(np.bincount(labels, minlength=len(CLASSES)).tolist())


def find_candidates(dataset: Dataset) -> list[str]:
    """Returns the published versions whose class counts match those of all available lists."""
    counts = {split: count_classes(part.labels) for split, part in dataset.splits.items()}
    return [
        name
        for name, published in SLICES.items()
        if counts and all(counts[split] == published[SPLITS.index(split)] for split in counts)
    ]


def check_version(dataset: Dataset) -> Check:
    """Compares slices per class and split with the published counts."""
    candidates = find_candidates(dataset)
    named = f'CT-{dataset.version}'
    # The candidates have equal counts for the available lists; they differ in missing ones.
    published = SLICES[candidates[0] if candidates else named]
    rows = []
    for split, part in dataset.splits.items():
        ours, theirs = count_classes(part.labels), published[SPLITS.index(split)]
        for name, a, b in zip((*CLASSES, 'total'), (*ours, sum(ours)), (*theirs, sum(theirs)), strict=True):
            rows.append((split, name, a, b, a - b))
    table = Table(
        f'Slices beside those of COVIDx {candidates[0] if candidates else named}',
        ('split', 'class', 'slices', 'published', 'difference'),
        rows,
    )
    here = join_words(list(dataset.splits))
    if not candidates:
        verdict, reason = LOOK, f'The class counts of {here or "the lists"} are of no published COVIDx CT version.'
    elif named in candidates:
        others = [name for name in candidates if name != named]
        verdict, reason = OK, f'The class counts of {here} are those of COVIDx {named}.'
        if others:
            reason = f'{reason[:-1]} and as well of {join_words(others)}: only the training list would tell them apart.'
    else:
        verdict = LOOK
        reason = f'The lists are named {named}, but their class counts are those of COVIDx {join_words(candidates)}.'
    return Check('lists.version', 'Version of COVIDx CT, by content', verdict, reason, tables=[table])
