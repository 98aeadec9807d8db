"""Reads one scan from DICOM, NIfTI, MetaImage, NRRD or image files as grey slices from head to feet.

Everything read is safe to print: file names, technical attributes and numbers, no patient data.
"""

import contextlib
import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from covidjax.data.lungs import LungsFinder, LungsGrid
from covidjax.data.preprocess import WINDOW_LEVEL_HU, WINDOW_WIDTH_HU, apply_window, convert_grey, open_image
from covidjax.data.scan import dicom, itk
from covidjax.data.scan.dicom import compute_planes
from covidjax.data.scan.hounsfield import HounsfieldCheck, round_plane
from covidjax.data.scan.nifti import open_nifti, open_nifti_file, report_damage
from covidjax.data.scan.series import (
    Series,
    check_series,
    choose_series,
    count_single,
    count_strays,
    create_affine,
    describe_geometry,
    group_series,
    refuse_undecodable,
)
from covidjax.data.scan.sources import Entry, hash_contents, open_entries
from covidjax.errors import TooLargeError, UserError, join_faults

_ORDER = axcodes2ornt(('I', 'P', 'L'))  # slices to the feet, rows to the back, columns to the patient's left
_IMAGE_MAGIC = (b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'II*\0', b'MM\0*', b'BM')
_VOXELS = ('.nii', '.nii.gz', *itk.ENDINGS)
MIN_SERIES = 3  # slices; fewer are scouts or bolus tracking
_MAX_LOST = 0.1  # share of the slices
# Reasons of `dicom.LeftOut` by which slices of the scan may be lost whatever the series they name.
_LOST = ('damaged', 'truncated', 'of impossible size', 'of several frames', 'without a position')
_MIN_CONTRAST = 32  # grey values between the 1st and 99th percentile


class Volume(NamedTuple):
    """One scan.

    Attributes:
      name: file or folder name.
      sha256: SHA-256, in hex, of the contents; the same for a folder and its zip.
      kind: 'DICOM', 'NIfTI', 'MetaImage', 'NRRD' or 'images'.
      slices: T slices, each uint8 [H, W], from head to feet, patient's right on the left; images may differ in size.
      depths_mm: [T] depth of each slice below the first, None for images.
      lungs: found in 3-D from Hounsfield units; None for images, or if not asked for.
      affine: [4, 4] from voxels of the source, as NIfTI has them (of DICOM: column, row, slice), to mm, RAS; None for
        images.
      facts: (name, value) pairs on what was read and how.
      notes: what was left out or assumed.
      doubts: reasons not to use the scan without --force.
      left_out: how many files or slices were left out, by reason.
      thickness_mm: of a slice, from the header; None if it is not there.
      planes_hu: Hounsfield units of some slices by their number (from 0), int16 [H, W]; None for images, or if not
        asked for.
    """

    name: str
    sha256: str
    kind: str
    slices: list[np.ndarray]
    depths_mm: np.ndarray | None
    lungs: LungsGrid | None
    affine: np.ndarray | None
    facts: list[tuple[str, str]]
    notes: list[str]
    doubts: list[str]
    left_out: dict[str, int]
    thickness_mm: float | None = None
    planes_hu: dict[int, np.ndarray] | None = None


class _Wanted(NamedTuple):
    """What to keep of Hounsfield units, beside grey values.

    Attributes:
      lungs: also find the lungs.
      hu_step: keep the planes 0, hu_step, 2 hu_step ...; 0: none.
    """

    lungs: bool
    hu_step: int


def read_volume(path: Path, series: str | None = None, *, with_lungs: bool = False, hu_step: int = 0) -> Volume:
    """Reads a scan.

    DICOM slices are ordered by position, not by name. NIfTI, MetaImage and NRRD are reoriented by their header. Images
    are in natural order of their names. Hounsfield units are mapped to grey by the COVIDx CT window; images are used
    unchanged.

    Args:
      path: folder of DICOM or images (searched recursively), a zip of one, NIfTI (.nii, .nii.gz), MetaImage
        (.mha, .mhd), NRRD (.nrrd, .nhdr), or a single file.
      series: name of the DICOM series to read if there are several.
      with_lungs: also find the lungs, where there are Hounsfield units.
      hu_step: also keep the Hounsfield units of every `hu_step`-th slice, where there are any; 0 keeps none.

    Raises:
      UserError: no CT found, or the input is unreadable; the message is the reason on one line.
    """
    path = Path(path)
    with open_entries(path) as entries:
        try:
            return _read_entries(entries, path.resolve().name, series, _Wanted(with_lungs, hu_step))
        except UserError as error:
            raise type(error)(f'{path}: {error}') from error


class _Contents(NamedTuple):
    """Files of an input by kind.

    Attributes:
      digests: SHA-256 of each file by name.
      frames: axial CT slices in DICOM.
      images: pictures.
      voxels: files of whole scans.
      left_out: why the others were left out.
    """

    digests: dict[str, bytes]
    frames: list[dicom.Frame]
    images: list[Entry]
    voxels: list[Entry]
    left_out: list[dicom.LeftOut]


def _sort_entries(entries: Sequence[Entry]) -> _Contents:
    """Reads every file once, of DICOM the headers."""
    contents = _Contents({}, [], [], [], [])
    for entry in entries:
        if entry.name.lower().endswith(_VOXELS):
            contents.digests[entry.name] = _hash_entry(entry)
            contents.voxels.append(entry)
            continue
        data = entry.read()
        contents.digests[entry.name] = hashlib.sha256(data).digest()
        if data.startswith(_IMAGE_MAGIC) and data[128:132] != b'DICM':  # DICOM may begin with a TIFF magic number
            contents.images.append(entry)
        elif data.startswith(b'PK\3\4') and data[128:132] != b'DICM':
            contents.left_out.append(dicom.LeftOut('zip archives in an archive or not named .zip'))
        else:
            try:
                found = dicom.read_frames(entry, data)
            except dicom.LeftOut as reason:
                contents.left_out.append(reason)
            else:
                contents.frames.extend(found or ())
                if found is None:
                    contents.left_out.append(dicom.LeftOut('not DICOM'))
    if contents.frames:
        others = len(contents.images) + len(contents.voxels)
        contents.left_out.extend([dicom.LeftOut('images, NIfTI, MetaImage and NRRD')] * others)
    return contents


def _hash_entry(entry: Entry) -> bytes:
    """Returns the SHA-256 of a file, which may be larger than the memory; of a member of a zip, which may not."""
    if entry.path is None:
        return hashlib.sha256(entry.read()).digest()
    with entry.path.open('rb') as file:
        return hashlib.file_digest(file, 'sha256').digest()


def _read_entries(entries: Sequence[Entry], name: str, series: str | None, wanted: _Wanted) -> Volume:
    contents = _sort_entries(entries)
    identity = name, hash_contents(list(contents.digests.values()))
    if contents.frames:
        groups = group_series(contents.frames)
        how = (
            'by --series' if series else 'the chest series with the most slices' if len(groups) > 1 else 'the only one'
        )
        return _read_series(identity, choose_series(groups, series), groups, how, contents.left_out, wanted)
    counts = Counter(map(str, contents.left_out))
    reasons = format_counts(counts)
    if counts.keys() - {'not DICOM'}:
        raise UserError(f'no axial CT slice in it ({reasons}): name the folder of a chest CT')
    if series is not None:
        raise UserError(f'--series={series} is for DICOM, and no DICOM slice is in it')
    images, voxels = contents.images, contents.voxels
    if len(voxels) > 1 or (voxels and images):
        raise UserError(
            f'{len(voxels)} NIfTI, MetaImage or NRRD files and {len(images)} images in it: name one of them'
        )
    if voxels:
        return _read_voxels(identity, voxels[0], counts, wanted)
    if images:
        return _read_images(identity, images, counts)
    raise UserError(
        f'no DICOM, NIfTI or image in it{f" ({reasons})" if reasons else ""}: name the folder of a chest CT'
    )


def find_frames(entries: Sequence[Entry], series: str | None = None) -> list[dicom.Frame]:
    """Returns the slices of the series that `read_volume` reads, from head to feet.

    Raises:
      UserError: there is no DICOM slice, or as `read_volume`.
    """
    frames = _sort_entries(entries).frames
    if not frames:
        raise UserError('no DICOM slice in it')
    return choose_series(group_series(frames), series).frames


class Found(NamedTuple):
    """A chest CT in a folder or a file of an archive.

    Attributes:
      series: name of the series, '' if the file has none.
      sha256: SHA-256, in hex, of the files of the series.
      share_copies: share of the slices that are copies of others.
      read: returns the scan or raises UserError.
      frames: slices of a DICOM series, from head to feet; empty for other files.
    """

    series: str
    sha256: str
    share_copies: float
    read: Callable[[], Volume]
    frames: Sequence[dicom.Frame] = ()


def find_scans(entries: Sequence[Entry], name: str, *, with_lungs: bool, hu_step: int = 0) -> list[Found]:
    """Finds every chest CT by the headers: axial series of `MIN_SERIES` slices or more, and files of whole scans.

    Args:
      entries: of a folder or of a file.
      name: for the scans.
      with_lungs, hu_step: see `read_volume`.

    Raises:
      UserError: no scan is found, but damaged files or single slices are.
    """
    contents, wanted = _sort_entries(entries), _Wanted(with_lungs, hu_step)
    found = []
    if contents.frames:
        series = group_series(contents.frames)
        files = [{frame.entry.name for frame in one.frames} for one in series]
        for i, one in enumerate(series):
            if one.frames[0].is_elsewhere or len(one.frames) < MIN_SERIES:
                continue
            digests = [contents.digests[file] for file in files[i]]
            if any(files[i] & other for k, other in enumerate(files) if k != i):  # phases in one multi-frame file
                digests.append(hashlib.sha256(str(sorted(frame.index for frame in one.frames)).encode()).digest())
            sha256 = hash_contents(digests)

            def read(one: Series = one, sha256: str = sha256) -> Volume:
                check_series(one)
                how = 'the only one' if len(series) == 1 else 'every series of an archive is'
                return _read_series((name, sha256), one, series, how, contents.left_out, wanted)

            share = one.num_copies / (one.num_copies + len(one.frames))
            found.append(Found(one.name, sha256, share, read, one.frames))
    counts = Counter(map(str, contents.left_out))
    if contents.frames:
        # Nothing may vanish: neither a scan of which most is damaged nor one in pieces.
        num_chest = sum(not frame.is_elsewhere for frame in contents.frames)
        if not found and num_chest and (counts['damaged'] or num_chest >= MIN_SERIES):
            reasons = f', and {format_counts(counts)}' if counts else ''
            raise UserError(f'{num_chest} axial CT slices that make no series of {MIN_SERIES}{reasons}')
        return found
    for entry in contents.voxels:
        identity = name, contents.digests[entry.name].hex()
        found.append(Found('', identity[1], 0.0, lambda i=identity, e=entry: _read_voxels(i, e, counts, wanted)))
    if not found and counts['damaged']:
        raise UserError(f'no axial CT slice in it ({format_counts(counts)})')
    return found


def format_counts(counts: Mapping[str, int]) -> str:
    """Returns e.g. '2 copies, 1 not DICOM'."""
    return ', '.join(f'{count:,} {reason}' for reason, count in counts.items())


def _read_series(
    identity: tuple[str, str],
    chosen: Series,
    series: Sequence[Series],
    how: str,
    left_out: Sequence[dicom.LeftOut],
    wanted: _Wanted,
) -> Volume:
    kept = chosen.frames
    counts, doubts, notes = Counter(map(str, left_out)), [], []
    label = kept[0].label
    # Slices of this scan, as far as one can tell. Scouts, captures and other series are none.
    lost = Counter(
        str(reason)
        for reason in left_out
        if str(reason).startswith(_LOST) or (all(label) and reason.label == label and not _is_other(reason))
    )
    if chosen.num_copies:
        notes.append(f'{chosen.num_copies} slices stood there twice and were left out')
    for reason, count in (
        ('of another size or spacing in this series', count_strays(chosen, series)),
        ('single slices', count_single(chosen, series)),
        ('copies', chosen.num_copies),
    ):
        lost[reason] += count
        counts[reason] += count
    counts['copies'] += sum(one.num_copies for one in series if one is not chosen)
    counts, lost = +counts, +lost
    if lost['damaged']:
        doubts.append(f'{lost["damaged"]} damaged files: slices may be missing')
    total = lost.total() + len(kept)
    if lost.total() > _MAX_LOST * total:
        doubts.append(f'{lost.total():,} of {total:,} slices of this scan were left out ({format_counts(lost)})')
    missing = {frame.missing for frame in kept} - {''}
    if 'modality and class' in missing:
        doubts.append('the headers do not say that it is a CT; its values look like Hounsfield units')
    elif missing:
        notes.append('the headers lack the modality; their class says CT')
    depths, geometry = describe_geometry(kept)
    between = float(np.median(np.diff(depths))) if len(depths) > 1 else 5.0  # any thickness does for one slice
    affine = create_affine(kept)
    finder = None
    if wanted.lungs:
        _, front, right = _orient_spacing(affine)
        height, width = kept[0].shape if _keeps_axes(affine) else kept[0].shape[::-1]
        finder = LungsFinder((len(kept), height, width), (between, front, right))
    names = [frame.entry.name for frame in kept]
    slices, planes_hu = _window_planes(compute_planes(kept), affine, names, finder, wanted.hu_step)
    lungs = None if finder is None else finder.find()
    others = [one.describe() for one in series if one is not chosen]
    facts = [
        ('series', chosen.describe()),
        ('chosen', how),
        *([('other series', '; '.join(others))] if others else []),
        *([('left out', format_counts(counts))] if counts else []),
        ('order', 'by position, from head to feet'),
        ('extent', f'{depths[-1]:.1f} mm'),
        *_WINDOWED,
    ]
    return Volume(
        *identity,
        'DICOM',
        slices,
        depths,
        lungs,
        _swap_axes(affine),
        facts,
        notes + geometry,
        doubts,
        dict(counts),
        kept[0].thickness,
        planes_hu,
    )


def _is_other(reason: dicom.LeftOut) -> bool:
    return str(reason) in ('localizers (scouts)', 'secondary captures', 'projection X-rays', 'not CT')


def _window_planes(
    planes: Iterable[np.ndarray | Exception],
    affine: np.ndarray,
    names: Sequence[str],
    finder: LungsFinder | None,
    hu_step: int,
) -> tuple[list[np.ndarray], dict[int, np.ndarray] | None]:
    """Maps the planes of a scan, from head to feet, to grey as they come: the scan takes one byte a voxel.

    Args:
      planes: of `compute_planes`.
      affine: of the scan.
      names: of the files, for messages.
      finder: gets every plane in Hounsfield units.
      hu_step: see `_Wanted`.

    Returns:
      The grey slices, and the planes to keep, or None.

    Raises:
      UserError: planes that can't be decoded, or values that are not Hounsfield units.
    """
    slices, kept, faults, check = [], {}, [], HounsfieldCheck()
    turn = ornt_transform(io_orientation(affine), _ORDER)
    for plane, name in zip(planes, names, strict=True):
        if isinstance(plane, Exception):
            faults.append(f'{name} ({type(plane).__name__})')
        elif not faults:
            check.add(plane)
            [plane] = apply_orientation(plane[np.newaxis], turn)
            if finder is not None:
                finder.add(plane)
            if hu_step and not len(slices) % hu_step:
                kept[len(slices)] = np.array(plane)
            slices.append(apply_window(np.ascontiguousarray(plane)))
    if faults:
        refuse_undecodable(list(dict.fromkeys(faults)))
    check.finish()
    return slices, kept or None


_WINDOWED = [('window', f'width {WINDOW_WIDTH_HU}, level {WINDOW_LEVEL_HU} HU, as COVIDx CT')]


def _orient_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Returns the distances in mm of slices, rows and columns after a turn to `_ORDER`."""
    lengths, axes = np.linalg.norm(affine[:3, :3], axis=0), io_orientation(affine)[:, 0].astype(int)
    right, front, feet = (float(lengths[axes.tolist().index(world)]) for world in range(3))
    return feet, front, right


def _swap_axes(affine: np.ndarray) -> np.ndarray:
    """Returns an affine from (slice, row, column) as one from (column, row, slice)."""
    return affine[:, [2, 1, 0, 3]]


def restore_axes(slices_TxHxW: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turns an array of slices in the order of `Volume.slices` back to the axes of the source: see `Volume.affine`."""
    return apply_orientation(slices_TxHxW, ornt_transform(_ORDER, io_orientation(affine)))


def restore_planes(slices_TxHxW: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Turns slices in the orientation of `Volume.slices` to that of the stored slices of DICOM, in the same order.

    Args:
      slices_TxHxW: all slices, or some.
      affine: of the scan, see `Volume.affine`.
    """
    # Of DICOM, the last axis runs from head to feet, as the first one does here.
    return restore_axes(slices_TxHxW, affine).T


def _keeps_axes(affine: np.ndarray) -> bool:
    """Returns whether rows stay rows in a turn to `_ORDER`."""
    return bool(io_orientation(affine)[1, 0] == 1)


def _read_nifti(identity: tuple[str, str], entry: Entry, left_out: Counter[str], wanted: _Wanted) -> Volume:
    with report_damage(), contextlib.ExitStack() as stack:
        opened = stack.enter_context(open_nifti_file(entry.path)) if entry.path else open_nifti(entry.read())
        image, shape = opened
        has_orientation = bool(image.header['sform_code'] or image.header['qform_code'])

        def read(place: int) -> np.ndarray:
            return np.asanyarray(image.dataobj[:, :, place]).reshape(shape[:2])

        doubts = [] if has_orientation else ['the NIfTI does not tell its orientation: order and sides are guessed']
        voxels = _Voxels('NIfTI', read, shape, 2, image.affine)
        return _read_planes(identity, voxels, doubts, left_out, wanted)


def _read_voxels(identity: tuple[str, str], entry: Entry, left_out: Counter[str], wanted: _Wanted) -> Volume:
    read = _read_itk if entry.name.lower().endswith(itk.ENDINGS) else _read_nifti
    return read(identity, entry, left_out, wanted)


def _read_itk(identity: tuple[str, str], entry: Entry, left_out: Counter[str], wanted: _Wanted) -> Volume:
    planes, affine, digest = itk.read_planes(entry, dicom.MAX_VOXELS)
    name, contents = identity
    # The header alone does not identify a scan whose voxels lie in a file of their own.
    identity = name, hash_contents([bytes.fromhex(contents), digest])
    kind = 'NRRD' if entry.name.lower().endswith(('.nrrd', '.nhdr')) else 'MetaImage'
    voxels = _Voxels(kind, planes.__getitem__, planes.shape, 0, affine)
    return _read_planes(identity, voxels, [], left_out, wanted)


class _Voxels(NamedTuple):
    """A file of a whole scan, whose planes are read one by one.

    Attributes:
      kind: of the file, see `Volume`.
      read: returns the plane of a place, of any numbers.
      shape: of the scan.
      axis: along which the planes lie one after the other, so that reading them is fast: 0 or 2.
      affine: [4, 4] from voxels to mm, RAS.
    """

    kind: str
    read: Callable[[int], np.ndarray]
    shape: tuple[int, int, int]
    axis: int
    affine: np.ndarray


def _read_planes(
    identity: tuple[str, str], voxels: _Voxels, doubts: list[str], left_out: Counter[str], wanted: _Wanted
) -> Volume:
    """Maps voxels to grey plane by plane and turns them by their affine to slices from head to feet."""
    affine = voxels.affine
    try:
        turn = io_orientation(affine)
        direction = affine[:3, turn[:, 0].tolist().index(2.0)]  # voxel axis along feet to head
        spacing = float(np.linalg.norm(direction))
        is_sound = abs(direction[2]) / spacing > 0.8 and 0 < spacing < np.inf
    except (ValueError, ArithmeticError, np.linalg.LinAlgError):
        is_sound = False
    if not is_sound:
        raise UserError('its slices are oblique or its header makes no sense: resample it to axial slices')
    # Neighbouring pixels of a plane shall be neighbours in memory.
    grey, check = np.empty(voxels.shape, np.uint8, 'C' if voxels.axis == 0 else 'F'), HounsfieldCheck()
    for place, of_place in enumerate(np.moveaxis(grey, voxels.axis, 0)):
        plane = round_plane(voxels.read(place))
        check.add(plane)
        of_place[...] = apply_window(plane)
    check.finish()
    slices = apply_orientation(grey, ornt_transform(turn, _ORDER))
    lungs, planes_hu = None, {} if wanted.hu_step else None
    if any(wanted):
        finder = LungsFinder(slices.shape, _orient_spacing(affine)) if wanted.lungs else None
        for place, plane in enumerate(_iterate_slices(voxels, ornt_transform(turn, _ORDER))):
            if finder is not None:
                finder.add(plane)
            if planes_hu is not None and place % wanted.hu_step == 0:
                planes_hu[place] = np.array(plane)
        lungs = finder and finder.find()
    facts = [
        ('voxels', ' x '.join(map(str, grey.shape))),
        *([('left out', format_counts(left_out))] if left_out else []),
        ('order', 'turned by its orientation, from head to feet'),
        ('slice distance', f'{spacing:.2f} mm'),
        *_WINDOWED,
    ]
    depths = spacing * np.arange(len(slices))
    source = affine if voxels.kind == 'NIfTI' else _swap_axes(affine)
    counts = dict(left_out)
    return Volume(
        *identity, voxels.kind, list(slices), depths, lungs, source, facts, [], doubts, counts, planes_hu=planes_hu
    )


def _iterate_slices(voxels: _Voxels, turn: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the slices in Hounsfield units, int16, after a turn to `_ORDER`. Reads the file again: memory is scarcer.

    If the planes of the file are no slices, they go through a temporary file of two bytes a voxel.
    """
    axis, (place_of_axis, direction) = voxels.axis, turn[voxels.axis]
    places = range(voxels.shape[axis])
    if place_of_axis == 0:
        for place in places if direction > 0 else reversed(places):
            yield apply_orientation(np.expand_dims(round_plane(voxels.read(place)), axis), turn)[0]
        return
    with tempfile.TemporaryFile() as file:
        hu = np.memmap(file, np.int16, shape=voxels.shape)
        for place, of_place in enumerate(np.moveaxis(hu, axis, 0)):
            of_place[...] = round_plane(voxels.read(place))
        yield from apply_orientation(hu, turn)


def _read_images(identity: tuple[str, str], entries: Sequence[Entry], left_out: Counter[str]) -> Volume:
    slices, faults, num_pixels = [], [], 0
    for entry in entries:
        try:
            slices.append(_read_image(entry.read()))
        except ValueError as error:
            faults.append(f'{entry.name}: {error}')
        else:
            num_pixels += slices[-1].size
        if num_pixels > dicom.MAX_VOXELS:
            raise TooLargeError(f'images of more than {dicom.MAX_VOXELS:,} pixels: name the folder of one scan')
    if faults:
        raise UserError(f'images that are no CT slices or unreadable: {join_faults(faults)}')
    sizes = Counter(s.shape for s in slices)
    doubts = []
    if np.ptp([np.percentile(s, (1, 99)) for s in slices]) < _MIN_CONTRAST:
        doubts.append('the images are nearly of one grey: window them to 8 bits first')
    return Volume(
        *identity,
        'images',
        slices,
        None,
        None,
        None,
        [
            ('images', f'{len(slices)}, {", ".join(f"{n} of {w} x {h}" for (h, w), n in sizes.most_common(3))}'),
            ('order', 'of the names, numbers counted; taken to run from head to feet'),
            ('window', 'none applied: images are taken as they are'),
        ],
        [f'left out: {format_counts(left_out)}'] if left_out else [],
        doubts,
        dict(left_out),
    )


def _read_image(data: bytes) -> np.ndarray:
    """Returns a grey image as uint8 [H, W]. Raises ValueError with the reason for any other image."""
    with open_image(io.BytesIO(data)) as image:
        if getattr(image, 'n_frames', 1) > 1:
            raise ValueError(f'{image.n_frames} pictures in one file; save each slice in a file of its own')
        if not image.mode.startswith('I') and image.mode not in ('1', 'L', 'LA', 'F'):
            colours = np.asarray(image.convert('RGB')).astype(np.int16)
            if (np.ptp(colours, axis=-1) > 24).mean() > 0.001:  # JPEG artefacts of grey pixels are smaller
                raise ValueError('in colour: a screenshot? export the slices without annotations, in grey')
        grey = np.asarray(convert_grey(image))
    if min(grey.shape) < 32:
        raise ValueError(f'{grey.shape[1]} x {grey.shape[0]} pixels, too small for a CT slice')
    return grey
