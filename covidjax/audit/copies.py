"""Images that are copies of each other, exact or re-saved.

Two thumbnails of 32x32, each shifted and scaled to mean 0 and variance 1, are compared by the root of their mean
squared difference: 0 for equal ones, about 1.4 for unrelated ones. Among 1,340 real slices, a copy re-saved as JPEG of
quality 50, with noise of 5 grey levels, or with other brightness and contrast was at most 0.05 from its original, one
resized to 224 pixels 0.07; the closest slices of different patients were 0.12 apart. So 0.08 is taken for a copy.
Slices of one scan are not compared: neighbours are alike by nature (0.03 between the closest).

Comparing all pairs of 425,000 images is out of the question. The cosine transform keeps distances, so the distance of a
few of its coefficients, the low ones that hold most of an image, is never larger than the whole one: a tree over them
finds every candidate, and none is missed.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy.fft
import scipy.spatial

from covidjax.audit import figures
from covidjax.audit.check import BROKEN, LOOK, OK, Check, count_things
from covidjax.audit.measure import Images
from covidjax.data.lists import Row

MAX_DISTANCE = 0.08
_LOW = 4  # 4 x 4 coefficients less the mean, which is 0, index the images
_MIN_CONTRAST = 3.0  # standard deviation of a thumbnail, below which it shows nothing to compare
_CHUNK = 4096
_MAX_SHOWN = 6


class Place(NamedTuple):
    """Where an image is listed."""

    split: str
    row: Row


def find_copies(thumbnails: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds pairs of images of different groups that are within `MAX_DISTANCE`.

    Args:
      thumbnails: uint8 [N, S, S].
      groups: int [N].

    Returns:
      Pairs int [M, 2], each ascending, and their distances float [M], the closest first. An image has at most one
      partner in another group, or a copy would be reported with the neighbours of its original. Images without
      contrast take no part.
    """
    seen = np.flatnonzero(thumbnails.std((1, 2)) >= _MIN_CONTRAST)
    low = np.empty((len(seen), _LOW * _LOW - 1), np.float32)
    for start in range(0, len(seen), _CHUNK):
        chunk = _normalise(thumbnails[seen[start : start + _CHUNK]])
        coefficients = scipy.fft.dctn(chunk, axes=(1, 2), norm='ortho')[:, :_LOW, :_LOW]
        low[start : start + _CHUNK] = coefficients.reshape(len(chunk), -1)[:, 1:]
    if len(seen) < 2:
        return np.zeros((0, 2), int), np.zeros(0)
    # An orthonormal transform sums squares over pixels; distances here are means over them.
    radius = MAX_DISTANCE * np.sqrt(thumbnails[0].size)
    pairs = seen[scipy.spatial.cKDTree(low).query_pairs(radius, output_type='ndarray')]
    pairs = pairs[groups[pairs[:, 0]] != groups[pairs[:, 1]]]
    distances = np.empty(len(pairs))
    for start in range(0, len(pairs), _CHUNK):
        first, second = (_normalise(thumbnails[pairs[start : start + _CHUNK, side]]) for side in (0, 1))
        distances[start : start + _CHUNK] = np.sqrt(((first - second) ** 2).mean((1, 2)))
    near = np.flatnonzero(distances <= MAX_DISTANCE)
    near = near[np.argsort(distances[near], kind='stable')]
    chosen, taken = [], set()
    for k in near:
        i, j = pairs[k].tolist()
        sides = {(i, groups[j]), (j, groups[i])}
        if taken.isdisjoint(sides):
            taken |= sides
            chosen.append(k)
    return np.sort(pairs[chosen], axis=1), distances[chosen]


def _normalise(thumbnails: np.ndarray) -> np.ndarray:
    """Returns thumbnails [N, S, S] with mean 0 and variance 1 each, float32."""
    centred = thumbnails - thumbnails.mean((1, 2), keepdims=True, dtype=np.float32)
    return centred / centred.std((1, 2), keepdims=True)


def check_copies(images: Images, places: Sequence[Place]) -> list[Check]:
    """Looks for identical and for near-identical images.

    Args:
      images: measurements.
      places: of each image, in the order of `images.index`.
    """
    members: defaultdict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(images.digests):
        if images.ranges[i, 0] < images.ranges[i, 1]:  # images of one grey are found as blank
            members[digest].append(i)
    identical = [group for group in members.values() if len(group) > 1]
    scans = {scan: number for number, scan in enumerate({place.row.scan for place in places})}
    # One of each group of identical images stands for all.
    kept = np.array([group[0] for group in members.values()], int)
    groups = np.array([scans[places[i].row.scan] for i in kept], int)
    pairs, distances = find_copies(images.thumbnails[kept], groups)
    pairs = kept[pairs]
    return [
        _judge('images.identical', 'Identical images', identical, [0.0] * len(identical), images, places),
        _judge('images.near_identical', 'Nearly identical images', pairs.tolist(), distances, images, places),
    ]


def _judge(name: str, title: str, groups: list[list[int]], distances, images: Images, places) -> Check:
    across = [len({places[i].split for i in group}) > 1 for group in groups]
    order = sorted(range(len(groups)), key=lambda k: not across[k])  # stable: those between splits first
    is_exact = name == 'images.identical'
    adjective = 'identical' if is_exact else 'nearly identical'
    faults = [
        ' = '.join(f'{places[i].row.file} ({places[i].split}, {places[i].row.patient})' for i in groups[k])
        + ('' if is_exact else f' (difference {distances[k]:.3f})')
        for k in order
    ]
    if not groups:
        where = 'are' if is_exact else 'of different scans are'
        reason = f'No two of {count_things(len(images.index), "image")} {where} {adjective}.'
        return Check(name, title, OK, reason)
    thing = 'group' if is_exact else 'pair'
    counted = count_things(len(groups), f'{thing} of {adjective} images', f'{thing}s of {adjective} images')
    if any(across):
        verdict = BROKEN
        reason = f'{counted}, {sum(across):,} of them in more than one list: results on them are no test.'
    else:
        verdict, reason = LOOK, f'{counted}, each within one list.'
    check = Check(name, title, verdict, reason, faults)
    shown = [
        (images.thumbnails[i], images.thumbnails[j], places[i].row.file, places[j].row.file)
        for i, j, *_ in (groups[k] for k in order[:_MAX_SHOWN])
    ]
    check.pictures.append(functools.partial(figures.render_pairs, shown))
    return check
