"""Groups DICOM slices into series, by their geometry where UIDs fail, and selects one.

Anonymised exports blank, repeat or change UIDs. A slice is therefore known by its place and its pixels, and a series by
orientation, pixel spacing, matrix, thickness and kernel. UIDs only separate series that are complete by themselves.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from covidjax.data.scan.dicom import MAX_VOXELS, TRAITS, Frame, compute_planes
from covidjax.errors import TooLargeError, UserError, join_faults

_SAME_MM = 1e-3
_SAME_DIRECTION, _SAME_SPACING = 0.01, 0.01  # cosine; share
_SPARSE = 1.5  # a part whose slices are so many times further apart than those of the whole is a fragment
_UNEVEN = 2.5  # a gap so many times the median is no gap between neighbours
_MIN_SLICES = 3  # fewer are a fragment
_MAX_PHASES = 8


class Series(NamedTuple):
    """Slices of one series, orientation, size and kernel.

    Attributes:
      name: value of --series that selects it.
      frames: slices from head to feet.
      num_copies: how many more slices were equal to one of these in place and pixels.
      conflict: why the slices can't be one scan, '' if they can.
    """

    name: str
    frames: list[Frame]
    num_copies: int = 0
    conflict: str = ''

    @property
    def study(self) -> str:
        """Study UID, '' if it is missing or differs between the slices."""
        studies = {frame.label[0] for frame in self.frames}
        return studies.pop() if len(studies) == 1 else ''

    def describe(self) -> str:
        """Returns e.g. 'series 4: 148 slices of 512 x 512, 2 mm thick, kernel D40s'."""
        return f'series {self.name}: {_describe(self.frames)}'


def group_series(frames: Sequence[Frame]) -> list[Series]:
    """Groups slices into series, each from head to feet and without copies (equal place and pixels).

    Raises:
      UserError: slices at one place can't be decoded, so that they can't be told apart.
    """
    digests = _Digests()
    parts: list[Series] = []
    for stack in _group_by_geometry(frames):
        separate = [part for pooled in _group_by_label(stack, digests) for part in _separate_phases(pooled, digests)]
        parts += _drop_copies(separate, digests)
    parts.sort(key=lambda part: _sorting_key(part.frames))
    numbers = Counter(part.frames[0].number for part in parts)
    seen, series = Counter(), []
    for part in parts:
        number = part.frames[0].number
        name = '?' if number is None else str(number)
        if numbers[number] > 1:
            name += chr(ord('a') + seen[number]) if seen[number] < 26 else f'-{seen[number]}'
            seen[number] += 1
        series.append(part._replace(name=name))
    return series


def choose_series(series: Sequence[Series], wanted: str | None) -> Series:
    """Returns the series named `wanted`, or by default the one with the most slices, preferring series of the chest.

    Raises:
      UserError: no series has that name; `wanted` is None and there are several studies; the series is too large or its
        slices can't be one scan.
    """
    names = '; '.join(one.describe() for one in series)
    if wanted is not None:
        found = [one for one in series if one.name == wanted]
        if not found:
            raise UserError(f'no axial CT series {wanted!r}: pass one of --series={", ".join(s.name for s in series)}')
        [chosen] = found
    elif len({one.study for one in series} - {''}) > 1:
        raise UserError(f'slices of several studies, choose one with --series: {names}')
    else:
        chosen = min(series, key=lambda one: (one.frames[0].is_elsewhere, -len(one.frames)))
    check_series(chosen)
    return chosen


def check_series(chosen: Series) -> None:
    """Raises UserError if the series is too large or its slices can't be one scan."""
    if chosen.conflict:
        raise UserError(f'series {chosen.name} holds {chosen.conflict}: keep those of one phase')
    rows, columns = chosen.frames[0].shape
    if len(chosen.frames) * rows * columns > MAX_VOXELS:
        raise TooLargeError(f'{chosen.describe()}: more than {MAX_VOXELS:,} voxels, choose another with --series')


def count_single(chosen: Series, series: Sequence[Series]) -> int:
    """Returns how many slices of the size of the chosen series stand alone or in pairs."""
    others = [other for other in series if other is not chosen and len(other.frames) < _MIN_SLICES]
    return sum(len(other.frames) for other in others if other.frames[0].shape == chosen.frames[0].shape)


def count_strays(chosen: Series, series: Sequence[Series]) -> int:
    """Returns how many slices of other size, spacing or orientation lie at places of their own in the chosen series."""
    label, number = chosen.frames[0].label, chosen.frames[0].number
    if not all(label):
        return 0
    normal, depths = chosen.frames[0].normal, _compute_depths(chosen.frames)
    reach = 0.5 * _compute_gap(depths)
    strays = 0
    for other in series:
        if other is chosen or other.frames[0].label != label or other.frames[0].number != number:
            continue
        for frame in other.frames:
            depth = float((chosen.frames[0].position - frame.position) @ normal)
            strays += bool(np.abs(depths - depth).min() > reach)
    return strays


class _Digests:
    """SHA-256 of the pixels of frames in Hounsfield units. Only frames that share a place are decoded."""

    def __init__(self):
        self._found: dict[tuple[int, int], bytes] = {}

    def compute(self, frames: Sequence[Frame]) -> list[bytes]:
        """Returns a digest of each frame. Raises UserError if one can't be decoded."""
        new = [frame for frame in frames if (id(frame.entry), frame.index) not in self._found]
        faults = []
        for frame, plane in zip(new, compute_planes(new), strict=True):
            if isinstance(plane, Exception):
                faults.append(f'{frame.entry.name} ({type(plane).__name__})')
            else:
                self._found[id(frame.entry), frame.index] = hashlib.sha256(plane.tobytes()).digest()
        if faults:
            refuse_undecodable(faults)
        return [self._found[id(frame.entry), frame.index] for frame in frames]


def refuse_undecodable(faults: Sequence[str]) -> None:
    """Raises the UserError about slices that can't be decoded."""
    raise UserError(f'slices that cannot be decoded, copy them again or leave them out: {join_faults(faults)}')


def _group_by_geometry(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Groups slices of one matrix, orientation and pixel spacing, within rounding."""
    groups: list[list[Frame]] = []
    for frame in frames:
        for group in reversed(groups):
            first = group[0]
            turn = np.abs([frame.right - first.right, frame.down - first.down]).max()
            scale = np.abs(np.divide(frame.spacing, first.spacing) - 1).max()
            if frame.shape == first.shape and turn <= _SAME_DIRECTION and scale <= _SAME_SPACING:
                group.append(frame)
                break
        else:
            groups.append([frame])
    return groups


def _group_by_label(stack: Sequence[Frame], digests: _Digests) -> list[list[Frame]]:
    """Groups slices of one geometry by UIDs, kernel and thickness. Fragments are joined; see the module's docstring."""
    pooled: list[list[Frame]] = []
    for kind in _split(stack, lambda frame: (frame.kernel, frame.thickness, frame.number)):
        gap = _compute_gap(_compute_depths(kind))
        fragments, whole = [], []
        parts = _split(kind, lambda frame: frame.label)
        for part in parts:
            is_fragment = (
                len(part) < _MIN_SLICES
                or (not part[0].label[1] and any(other[0].label[1] for other in parts))
                or _compute_gap(_compute_depths(part)) > _SPARSE * gap
            )
            (fragments if is_fragment else whole).append(part)
        pool = _remove_known([frame for part in fragments for frame in part], whole, digests)
        pooled += _join([*whole, *([pool] if pool else [])], fragments)
    # A kernel, a thickness or a number that some headers lack.
    incomplete = [part for part in pooled if not part[0].kernel or None in (part[0].thickness, part[0].number)]
    joined = _join(pooled, incomplete)
    # A number for every file.
    tiny = [part for part in joined if len(part) < _MIN_SLICES]
    for pool in _split([frame for part in tiny for frame in part], lambda frame: (frame.kernel, frame.thickness)):
        first = [place[0] for place in _find_places(pool)]
        if len(first) >= _MIN_SLICES and _is_even(first[:1], first[1:]):
            known = {id(frame) for frame in pool}
            joined = [*(part for part in joined if id(part[0]) not in known), pool]
    return joined


def _split(frames: Sequence[Frame], key: Callable[[Frame], Hashable]) -> list[list[Frame]]:
    groups: dict[Any, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(key(frame), []).append(frame)
    return list(groups.values())


def _remove_known(pool: list[Frame], whole: Sequence[Sequence[Frame]], digests: _Digests) -> list[Frame]:
    """Returns the pool in which copies of slices of complete series stand beside these no more; adds them to these."""
    kept = []
    for frame in pool:
        for part in whole:
            same = [other for other in part if np.abs(other.position - frame.position).max() < _SAME_MM]
            if same and len(set(digests.compute([frame, *same]))) == 1:
                part.append(frame)  # `_separate_phases` removes copies, and so they are counted
                break
        else:
            kept.append(frame)
    return kept


def _join(parts: list[list[Frame]], fragments: Sequence[list[Frame]]) -> list[list[Frame]]:
    """Joins parts that are one evenly spaced stack only together. At most one of two joined parts is complete."""
    parts = sorted(parts, key=len, reverse=True)
    joined: list[list[Frame]] = []
    loose = {id(frame) for part in fragments for frame in part}
    for part in parts:
        for target in joined:
            is_loose = id(part[0]) in loose or id(target[0]) in loose
            first, second = target[0], part[0]
            is_continued = first.number is not None and first.number == second.number
            is_continued &= first.label[0] == second.label[0]
            if (is_loose or is_continued) and _are_compatible(first, second) and _is_even(target, part):
                target += part
                break
        else:
            joined.append(list(part))
    return joined


def _are_compatible(first: Frame, second: Frame) -> bool:
    """Returns whether kernel, thickness and number agree as far as the headers tell them."""
    pairs = ((getattr(frame, name) for frame in (first, second)) for name in ('kernel', 'thickness', 'number'))
    return all(len(set(pair) - {'', None}) < 2 for pair in pairs)


def _is_even(target: Sequence[Frame], part: Sequence[Frame]) -> bool:
    """Returns whether two parts interleave or continue each other in even steps, with no two slices at one place."""
    depths = np.sort(_compute_depths([*target, *part]))
    gaps = np.diff(depths)
    before = np.diff(np.sort(_compute_depths(target)))
    gap = _compute_gap(depths)
    return bool(gaps.min() >= 0.5 * gap and gaps.max() <= max(_UNEVEN * gap, before.max(initial=0) + _SAME_MM))


def _compute_depths(frames: Sequence[Frame]) -> np.ndarray:
    """Returns the depth of each slice below the first [T], in mm."""
    normal = frames[0].normal
    return np.array([float((frames[0].position - frame.position) @ normal) for frame in frames])


def _compute_gap(depths: np.ndarray) -> float:
    """Returns the median distance of neighbouring places in mm, infinity for one place."""
    gaps = np.diff(np.sort(depths))
    gaps = gaps[gaps > _SAME_MM]
    return float(np.median(gaps)) if len(gaps) else np.inf


def _find_places(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Returns the slices of each place, from head to feet."""
    depths = _compute_depths(frames)
    order = np.argsort(depths, kind='stable')
    starts = np.flatnonzero(np.diff(depths[order], prepend=-np.inf) > _SAME_MM)
    return [[frames[i] for i in members] for members in np.split(order, starts[1:])]


def _find_different(places: Sequence[Sequence[Frame]], digests: _Digests) -> list[list[Frame]]:
    """Returns the places that hold different slices, without copies."""
    different = []
    for place in places:
        if len(place) > 1:
            kept = _remove_copies(place, digests)
            if len(kept) > 1:
                different.append(kept)
    return different


def _remove_copies(place: Sequence[Frame], digests: _Digests) -> list[Frame]:
    """Returns the slices of one place, of equal ones the first."""
    if len(place) == 1:
        return list(place)
    # Slices of equal pixels that stand apart in the plane are no copies.
    keys = [(digest, *np.round(frame.position, 2)) for digest, frame in zip(digests.compute(place), place, strict=True)]
    return list(dict(zip(reversed(keys), reversed(place), strict=True)).values())[::-1]


def _separate_phases(frames: Sequence[Frame], digests: _Digests) -> list[Series]:
    """Returns the phases of a stack that has several, or the whole with its conflict if nothing tells them apart."""
    places = _find_places(frames)
    different = _find_different(places, digests)
    if not different:
        return [_create_series(places, digests)]
    keys = [lambda frame, i=i: frame.traits[i] for i in range(len(TRAITS))]
    for key in (*keys, _find_origin):
        phases = [_find_places(phase) for phase in _split(frames, key)]
        if 1 < len(phases) <= _MAX_PHASES and not any(
            len(phase) < _MIN_SLICES or _find_different(phase, digests) for phase in phases
        ):
            return [_create_series(phase, digests) for phase in phases]
    first, second = ([place[i] for place in different] for i in (0, 1))
    return [
        _create_series(places, digests)._replace(
            conflict=f'different pictures of one place, at {len(different)} of {len(places)} places: '
            f'{_describe(first)}, {_locate(first)}; {_describe(second)}, {_locate(second)}'
        )
    ]


def _create_series(places: Sequence[Sequence[Frame]], digests: _Digests) -> Series:
    kept = [frame for place in places for frame in _remove_copies(place, digests)]
    return Series('', kept, sum(map(len, places)) - len(kept))


def _find_origin(frame: Frame) -> tuple[float, ...]:
    """Returns where the slice lies in its plane, in mm; a second reconstruction may have another field of view."""
    return tuple(np.round([frame.position @ frame.right, frame.position @ frame.down], 1))


def _drop_copies(parts: Sequence[Series], digests: _Digests) -> list[Series]:
    """Drops series that are whole copies of another."""
    kept: list[Series] = []
    for part in parts:
        for i, other in enumerate(kept):
            if _are_copies(part.frames, other.frames, digests):
                copies = other.num_copies + part.num_copies + len(part.frames)
                kept[i] = other._replace(num_copies=copies)
                break
        else:
            kept.append(part)
    return kept


def _are_copies(first: Sequence[Frame], second: Sequence[Frame], digests: _Digests) -> bool:
    if len(first) != len(second):
        return False
    if np.abs([a.position - b.position for a, b in zip(first, second, strict=True)]).max() > _SAME_MM:
        return False
    # The first pair that differs ends the comparison: the phases of a scan are decoded once, not twice.
    return all(len(set(digests.compute([a, b]))) == 1 for a, b in zip(first, second, strict=True))


def _sorting_key(frames: Sequence[Frame]) -> tuple[Any, ...]:
    first = frames[0]
    return (*first.label, first.number or 0, first.shape, first.kernel, first.thickness or 0, first.traits)


def _describe(frames: Sequence[Frame]) -> str:
    first = frames[0]
    count = f'{len(frames)} slice{"s" if len(frames) > 1 else ""}'
    thickness = f', {first.thickness:g} mm thick' if first.thickness else ''
    kernel = f', kernel {first.kernel}' if first.kernel else ''
    return f'{count} of {first.shape[1]} x {first.shape[0]}{thickness}{kernel}'


def _locate(frames: Sequence[Frame]) -> str:
    """Returns the first and the last file by name and, where there are any, the range of instance numbers."""
    names = sorted(frame.entry.name for frame in frames)
    instances = [frame.instance for frame in frames if frame.instance is not None]
    numbers = f', instances {min(instances)} to {max(instances)}' if instances else ''
    return f'files {names[0]} to {names[-1]}{numbers}'


def create_affine(frames: Sequence[Frame]) -> np.ndarray:
    """Returns the affine [4, 4] from (slice, row, column) to mm, RAS. The frames must run from head to feet."""
    first, last = frames[0], frames[-1]
    step = -first.normal * (first.thickness or 1)
    if len(frames) > 1:
        step = (last.position - first.position) / (len(frames) - 1)
    affine = np.eye(4)
    affine[:3] = np.stack([step, first.down * first.spacing[0], first.right * first.spacing[1], first.position], axis=1)
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def describe_geometry(frames: Sequence[Frame]) -> tuple[np.ndarray, list[str]]:
    """Returns the depth of each slice below the first, [T] in mm, and notes on tilt and uneven gaps."""
    normal, notes = frames[0].normal, []
    depths = np.array([float((frames[0].position - frame.position) @ normal) for frame in frames])
    tilt = np.degrees(np.arccos(min(1.0, normal[2])))
    if tilt > 1:
        notes.append(f'the slices are tilted by {tilt:.0f} degrees')
    gaps = np.diff(depths)
    if len(gaps) and gaps.max() > 1.1 * np.median(gaps):
        notes.append(f'gaps between slices are uneven, {gaps.min():.2f} to {gaps.max():.2f} mm: some may be missing')
    return depths, notes
