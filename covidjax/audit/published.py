"""The published counts of COVIDx CT, and which version and draft a set of lists is by its content.

CT-2A was published three times under one name: the validation and test lists stayed, the training list grew. The B
variants add training cases whose diagnosis could not be verified. Source: the data tables of the COVIDNet-CT
repository over its history; CT-2A agrees with Table I of the paper, CT-1 in its totals with what is quoted of it.
"""

import numpy as np

from covidjax.audit.check import LOOK, OK, Check, join_words
from covidjax.audit.dataset import Dataset
from covidjax.data.lists import CLASSES, SPLITS
from covidjax.report.page import Table

_VAL_2, _TEST_2 = (11842, 7400, 6244), (12245, 7395, 6018)
_VAL_3, _TEST_3 = (17570, 8008, 8147), (17922, 7965, 7894)

# Slices per class of train, val and test.
SLICES = {
    'CT-1': ((27201, 22061, 12520), (9107, 7400, 4529), (9450, 7395, 4346)),
    'CT-2A': ((35996, 25496, 82286), _VAL_2, _TEST_2),
    'CT-2A first draft': ((35446, 22044, 17557), _VAL_2, _TEST_2),
    'CT-2A second draft': ((35996, 25496, 36374), _VAL_2, _TEST_2),
    'CT-2B': ((35996, 25496, 88467), _VAL_2, _TEST_2),
    'CT-2B first draft': ((35996, 23326, 23454), _VAL_2, _TEST_2),
    'CT-2B second draft': ((35996, 25496, 42555), _VAL_2, _TEST_2),
    'CT-3A': ((35996, 26970, 294552), _VAL_3, _TEST_3),
    'CT-3B': ((35996, 26970, 300733), _VAL_3, _TEST_3),
}

# Sequences of 16 slices per class of train, val and test, made from CT-2A: the paper's Table II.
SEQUENCES = ((486, 403, 1501), (172, 112, 146), (174, 100, 134))


def count_classes(labels: np.ndarray) -> tuple[int, ...]:
    """Returns the number of examples of each class."""
    return tuple(np.bincount(labels, minlength=len(CLASSES)).tolist())


def find_candidates(dataset: Dataset) -> list[str]:
    """Returns the published versions with which the class counts of all lists at hand agree."""
    counts = {split: count_classes(part.labels) for split, part in dataset.splits.items()}
    return [
        name
        for name, published in SLICES.items()
        if counts and all(counts[split] == published[SPLITS.index(split)] for split in counts)
    ]


def check_version(dataset: Dataset) -> Check:
    """Compares the slices per class and split with the published ones."""
    candidates = find_candidates(dataset)
    named = f'CT-{dataset.version}'
    # Equal for all candidates: they differ in lists that are not here.
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
