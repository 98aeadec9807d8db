"""Finds patients and pictures that the data of a run share with other data, by the rules of `copies`."""

import hashlib
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from covidjax.audit.copies import find_copies
from covidjax.audit.measure import measure_images
from covidjax.data.lists import Row
from covidjax.evaluation.baselines import THUMBNAIL_SIZE


class Pictures(NamedTuple):
    """Measurements of N pictures.

    Attributes:
      names: of each picture, with its patient, as shown to people.
      digests: hash of the pixels of each.
      thumbnails: uint8 [N, S, S].
    """

    names: list[str]
    digests: list[bytes]
    thumbnails: np.ndarray

    def take(self, names: Container[str]) -> 'Pictures':
        """Returns the pictures with these names."""
        places = [i for i, name in enumerate(self.names) if name in names]
        return Pictures([self.names[i] for i in places], [self.digests[i] for i in places], self.thumbnails[places])


def name_picture(row: Row) -> str:
    """Returns the name of the picture of a row."""
    return f'{row.file} ({row.patient})'


def measure_listed(rows: Mapping[str, Sequence[Row]], folder: Path) -> Pictures:
    """Measures the images of lists, whole and as they lie on disk; unreadable ones are left out."""
    by_file = {row.file: row for of_split in rows.values() for row in of_split}
    images = measure_images(list(by_file.values()), folder, set())
    names = [name_picture(by_file[file]) for file in images.index]
    return Pictures(names, images.digests, images.thumbnails)


def measure_prepared(slices: Iterable[tuple[str, np.ndarray]]) -> Pictures:
    """Measures prepared slices, (name, uint8 [S, S]) each."""
    names, digests, thumbnails = [], [], []
    for name, grey in slices:
        names.append(name)
        digests.append(hashlib.blake2b(b'%d %d ' % grey.shape + grey.tobytes(), digest_size=16).digest())
        small = Image.fromarray(grey).resize((THUMBNAIL_SIZE, THUMBNAIL_SIZE), Image.Resampling.BOX)
        thumbnails.append(np.asarray(small))
    shape = len(names), THUMBNAIL_SIZE, THUMBNAIL_SIZE
    return Pictures(names, digests, np.array(thumbnails, np.uint8).reshape(shape))


def find_shared_pictures(inside: Pictures, outside: Pictures) -> list[str]:
    """Returns a line for every picture of `outside` that is the same as one of `inside`, or nearly (see `copies`)."""
    known = dict(zip(inside.digests, inside.names, strict=True))
    is_blank = outside.thumbnails.reshape(len(outside.names), -1).std(1) == 0 if outside.names else []
    exact = {i: known[digest] for i, digest in enumerate(outside.digests) if digest in known and not is_blank[i]}
    faults = [f'{outside.names[i]} = {name}' for i, name in exact.items()]
    others = [i for i in range(len(outside.names)) if i not in exact]
    thumbnails = np.concatenate([inside.thumbnails, outside.thumbnails[others]])
    pairs, distances = find_copies(thumbnails, np.arange(len(thumbnails)) >= len(inside.names))
    for (first, second), distance in zip(pairs.tolist(), distances, strict=True):
        name = outside.names[others[second - len(inside.names)]]
        faults.append(f'{name} = {inside.names[first]} (difference {distance:.3f})')
    return faults
