"""Finds images that are copies of each other, exact or re-saved.

Distance: the root mean squared difference of two 32x32 thumbnails, each normalised to mean 0 and variance 1. It is 0
for equal images and about 1.4 for unrelated ones. Among 1,340 real slices, a copy re-saved as JPEG of quality 50, with
noise of 5 grey levels, or with other brightness and contrast was at most 0.05 from its original, and one resized to 224
pixels 0.07. The closest slices of different patients were 0.12 apart. The threshold for a copy is therefore 0.08.
Slices of one scan are not compared, because neighbours are similar (0.03 between the closest).

Comparing all pairs of 425,000 images is too slow. Candidates come from a k-d tree over the low coefficients of the
cosine transform, which hold most of an image. The transform is orthonormal, so the distance over a few coefficients is
never larger than the full distance: no pair is missed.
"""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy

from covidjax.audit import figures
from covidjax.audit.check import BROKEN, LOOK, OK, Check, count_things
from covidjax.audit.measure import Images
from covidjax.data.lists import Row

MAX_DISTANCE = 0.08
_LOW = 4  # 4 x 4 coefficients index the images, without the mean, which is 0
_MIN_CONTRAST = 3.0  # standard deviation of a thumbnail below which it is not compared
_CHUNK = 4096
_MAX_SHOWN = 6


class Place(NamedTuple):
    """The split and row that list an image."""

    split: str
    row: Row


def find_copies(thumbnails: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds pairs of images from different groups at a distance of at most `MAX_DISTANCE`.

    Args:
      thumbnails: uint8 [N, S, S].
      groups: group of each image, here its scan, int [N].

    Returns:
      Pairs int [M, 2], each ascending, and their distances float [M], the closest first. An image has at most one
      partner per other group; otherwise a copy would also pair with the neighbours of its original. Images without
      contrast are skipped.
    """
    seen = np.flatnonzero(thumbnails.std((1, 2)) >= _MIN_CONTRAST)
    low = np.empty((len(seen), _LOW * _LOW - 1), np.float32)
    for start in range(0, len(seen), _CHUNK):
        chunk = _normalise(thumbnails[seen[start : start + _CHUNK]])
        coefficients = scipy.fft.dctn(chunk, axes=(1, 2), norm='ortho')[:, :_LOW, :_LOW]
        low[start : start + _CHUNK] = coefficients.reshape(len(chunk), -1)[:, 1:]
    if len(seen) < 2:
        return np.zeros((0, 2), int), np.zeros(0)
    # The transform preserves sums of squares over pixels, but distances here are means over pixels.
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
    """Returns thumbnails [N, S, S], each with mean 0 and variance 1, float32."""
    centred = thumbnails - thumbnails.mean((1, 2), keepdims=True, dtype=np.float32)
    return centred / centred.std((1, 2), keepdims=True)


def check_copies(images: Images, places: Sequence[Place]) -> list[Check]:
    """Checks for identical and nearly identical images.

    Args:
      images: measurements of the images.
      places: place of each image, in the order of `images.index`.
    """
    members: defaultdict[bytes, list[int]] = defaultdict(list)
    for i, digest in enumerate(images.digests):
        if images.ranges[i, 0] < images.ranges[i, 1]:  # blank images are reported by images.brightness
            members[digest].append(i)
    identical = [group for group in members.values() if len(group) > 1]
    scans = {scan: number for number, scan in enumerate({place.row.scan for place in places})}
    # Keep one image of each group of identical ones.
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
    order = sorted(range(len(groups)), key=lambda k: not across[k])  # stable sort: groups across splits come first
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
