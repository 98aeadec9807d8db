"""Where patients come from: chooses sources of a dataset and counts its classes by source."""

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from covidjax.data.lists import CLASSES, Row, find_absent_classes
from covidjax.errors import UserError

if TYPE_CHECKING:
    from covidjax.data.covidx_ct import Prepared


class Subset:
    """Records of several splits in a given order; stands in for a `covidx_ct.SliceSource`.

    Args:
      places: (source, number of the record) of every record.
    """

    def __init__(self, places: Sequence[tuple[Sequence[dict], int]]):
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict:
        """Returns one record. Raises IndexError out of range."""
        source, number = self._places[index]
        return source[number]


def parse_sources(text: str) -> list[str]:
    """Parses the field `data.sources`: names separated by commas."""
    return [name.strip() for name in text.split(',') if name.strip()]


def check_sources(chosen: Sequence[str], known: Sequence[str], what: str) -> None:
    """Checks names of sources.

    Args:
      chosen: names to check.
      known: names that there are.
      what: the start of their list in the message, e.g. 'the lists have'.

    Raises:
      UserError: a name is unknown.
    """
    absent = [name for name in chosen if name not in known]
    if absent:
        raise UserError(f'no source {", ".join(absent)}: {what} {", ".join(known) or "no sources (no metadata.csv?)"}')


def select_sources(data: 'Prepared', chosen: Sequence[str]) -> 'Prepared':
    """Returns the dataset with the slices of some sources only; an empty choice is all of them.

    Raises:
      UserError: a source is unknown, or without the others a split is empty or fewer than two classes are left to train
        on.
    """
    if not chosen:
        return data
    check_sources(chosen, sorted({row.source for rows in data.rows.values() for row in rows} - {''}), 'the lists have')
    kept = {split: [i for i, row in enumerate(rows) if row.source in chosen] for split, rows in data.rows.items()}
    rows = {split: [data.rows[split][i] for i in places] for split, places in kept.items()}
    empty = [split for split, of_split in rows.items() if not of_split]
    if empty:
        raise UserError(f'data.sources={",".join(chosen)} leaves no slice for {empty[0]}: choose more sources')
    absent = find_absent_classes(rows['train'])
    if len(CLASSES) - len(absent) < 2:
        raise UserError(f'data.sources={",".join(chosen)} leaves one class to train on: choose more sources')
    digest = hashlib.sha256(json.dumps([data.fingerprint, sorted(set(chosen))]).encode())
    return data._replace(
        fingerprint=digest.hexdigest(),
        rows=rows,
        sources={split: Subset([(data.sources[split], i) for i in places]) for split, places in kept.items()},
    )


def count_sources(rows: dict[str, Sequence[Row]]) -> dict[str, dict[str, dict[str, int]]]:
    """Returns source -> split -> class -> number of slices; {} if no source is known. An unknown one is 'not given'."""
    names = sorted({row.source for of_split in rows.values() for row in of_split})
    if not any(names):
        return {}
    counts = {name or 'not given': {split: dict.fromkeys(CLASSES, 0) for split in rows} for name in names}
    for split, of_split in rows.items():
        for row in of_split:
            counts[row.source or 'not given'][split][CLASSES[row.label]] += 1
    return counts


class LoneClass(NamedTuple):
    """A class that only one source has."""

    name: str
    source: str


def find_lone_classes(rows: Sequence[Row]) -> list[LoneClass]:
    """Returns the classes of which all rows come from one source, where there are two sources or more.

    Rows without a source count as one more source.
    """
    sources: dict[int, set[str]] = {}
    for row in rows:
        sources.setdefault(row.label, set()).add(row.source)
    if len(set().union(*sources.values())) < 2:
        return []
    lone = {label: next(iter(names)) for label, names in sorted(sources.items()) if len(names) == 1}
    return [LoneClass(CLASSES[label], source) for label, source in lone.items() if source]


def describe_lone_classes(lone: Sequence[LoneClass]) -> str:
    """Returns what every report says of them; '' if there are none."""
    if not lone:
        return ''
    shown = [f'{one.name} ({one.source})' for one in lone]
    if len(shown) == 1:
        return f'{lone[0].name} comes from one source ({lone[0].source}): what separates it may be the source'
    return f'{", ".join(shown[:-1])} and {shown[-1]} come from one source each: what separates them may be the source'
