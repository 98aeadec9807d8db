"""Reads one scan from DICOM, NIfTI or image files as grey slices from head to feet.

Everything read is safe to print: file names, technical attributes and numbers, no patient data.
"""

import gzip
import hashlib
import io
import logging
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from covidjax.data.lungs import find_lungs_in_scan
from covidjax.data.preprocess import WINDOW_LEVEL_HU, WINDOW_WIDTH_HU, apply_window, convert_grey, open_image
from covidjax.data.scan import dicom
from covidjax.data.scan.sources import MAX_BYTES, Entry, hash_contents, open_entries
from covidjax.errors import UserError, join_faults

_ORDER = axcodes2ornt(('I', 'P', 'L'))  # slices to the feet, rows to the back, columns to the patient's left
_IMAGE_MAGIC = (b'\x89PNG\r\n\x1a\n', b'\xff\xd8\xff', b'II*\0', b'MM\0*', b'BM')
_MIN_AIR, _MIN_TISSUE, _MAX_METAL = 0.02, 0.02, 0.02  # limits, as shares of the voxels
_MIN_CONTRAST = 32  # grey values between the 1st and 99th percentile


class Volume(NamedTuple):
    """One scan.

    Attributes:
      name: file or folder name.
      sha256: SHA-256, in hex, of the contents; the same for a folder and its zip.
      kind: 'DICOM', 'NIfTI' or 'images'.
      slices: T slices, each uint8 [H, W], from head to feet, patient's right on the left; images may differ in size.
      depths_mm: [T] depth of each slice below the first, None for images.
      lungs: bool [T, H, W], found in 3-D from Hounsfield units; None for images, or if not asked for.
      facts: (name, value) pairs on what was read and how.
      notes: what was left out or assumed.
      doubts: reasons not to use the scan without --force.
    """

    name: str
    sha256: str
    kind: str
    slices: list[np.ndarray]
    depths_mm: np.ndarray | None
    lungs: np.ndarray | None
    facts: list[tuple[str, str]]
    notes: list[str]
    doubts: list[str]


def read_volume(path: Path, series: str | None = None, *, with_lungs: bool = False) -> Volume:
    """Reads a scan.

    DICOM slices are ordered by position, not by name. NIfTI is reoriented by its header. Images are in natural order of
    their names. Hounsfield units are mapped to grey by the COVIDx CT window; images are used unchanged.

    Args:
      path: folder of DICOM or images (searched recursively), a zip of one, NIfTI (.nii, .nii.gz), or a single file.
      series: name of the DICOM series to read if there are several.
      with_lungs: also find the lungs, where there are Hounsfield units.

    Raises:
      UserError: no CT found, or the input is unreadable; the message is the reason on one line.
    """
    path = Path(path)
    with open_entries(path) as entries:
        try:
            return _read_entries(entries, path.resolve().name, series, with_lungs)
        except UserError as error:
            raise UserError(f'{path}: {error}') from error


def _read_entries(entries: Sequence[Entry], name: str, series: str | None, with_lungs: bool) -> Volume:
    digests, frames, images, niftis = [], [], [], []
    left_out: Counter[str] = Counter()
    for entry in entries:
        data = entry.read()
        digests.append(hashlib.sha256(data).digest())
        if entry.name.lower().endswith(('.nii', '.nii.gz')):
            niftis.append(entry)
        elif data.startswith(_IMAGE_MAGIC) and data[128:132] != b'DICM':  # DICOM may begin with a TIFF magic number
            images.append(entry)
        else:
            try:
                found = dicom.read_frames(entry, data)
            except dicom.LeftOut as reason:
                left_out[str(reason)] += 1
            else:
                frames += found or ()
                left_out['not DICOM'] += found is None
    identity = name, hash_contents(digests)
    left_out = +left_out
    reasons = ', '.join(f'{count} {reason}' for reason, count in left_out.items())
    if frames:
        left_out['images and NIfTI'] += len(images) + len(niftis)
        return _read_dicom(identity, frames, series, +left_out, with_lungs)
    if left_out.keys() - {'not DICOM'}:
        raise UserError(f'no axial CT slice in it ({reasons}): name the folder of a chest CT')
    if series is not None:
        raise UserError(f'--series={series} is for DICOM, and no DICOM slice is in it')
    if len(niftis) > 1 or (niftis and images):
        raise UserError(f'{len(niftis)} NIfTI files and {len(images)} images in it: name one of them')
    if niftis:
        return _read_nifti(identity, niftis[0], with_lungs)
    if images:
        notes = [f'left out: {reasons}'] if reasons else []
        return _read_images(identity, images, notes)
    raise UserError(
        f'no DICOM, NIfTI or image in it{f" ({reasons})" if reasons else ""}: name the folder of a chest CT'
    )


def _read_dicom(
    identity: tuple[str, str],
    frames: Sequence[dicom.Frame],
    wanted: str | None,
    left_out: Counter[str],
    with_lungs: bool,
) -> Volume:
    series = dicom.group_series(frames)
    chosen = dicom.choose_series(series, wanted)
    hu, kept, notes = dicom.load_series(chosen)
    check_hu(hu)
    depths, geometry = dicom.describe_geometry(kept)
    num_copies = len(frames) - sum(len(one.frames) for one in series)
    if num_copies:
        left_out['copies'] += num_copies
    doubts = []
    if left_out['damaged']:
        doubts.append(f'{left_out["damaged"]} damaged files: slices may be missing')
    others = [one.describe() for one in series if one is not chosen]
    facts = [
        ('series', chosen.describe()),
        ('chosen', 'by --series' if wanted else 'the chest series with the most slices' if others else 'the only one'),
        *([('other series', '; '.join(others))] if others else []),
        *([('left out', ', '.join(f'{n} {reason}' for reason, n in left_out.items()))] if left_out else []),
        ('order', 'by position, from head to feet'),
        ('extent', f'{depths[-1]:.1f} mm'),
        *_WINDOWED,
    ]
    slices = _orient(hu, dicom.create_affine(kept))
    between = float(np.median(np.diff(depths))) if len(depths) > 1 else 5.0  # any thickness does for one slice
    lungs = find_lungs_in_scan(slices, (between, *kept[0].spacing)) if with_lungs else None
    return Volume(*identity, 'DICOM', [apply_window(s) for s in slices], depths, lungs, facts, notes + geometry, doubts)


_WINDOWED = [('window', f'width {WINDOW_WIDTH_HU}, level {WINDOW_LEVEL_HU} HU, as COVIDx CT')]


def _orient(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Reorients voxels to [T, H, W]: slices to the feet, rows to the back, columns to the patient's left."""
    return apply_orientation(voxels, ornt_transform(io_orientation(affine), _ORDER))


def _orient_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Returns the distances in mm of slices, rows and columns of what `_orient` returns."""
    lengths, axes = np.linalg.norm(affine[:3, :3], axis=0), io_orientation(affine)[:, 0].astype(int)
    right, front, feet = (float(lengths[axes.tolist().index(world)]) for world in range(3))
    return feet, front, right


def _read_nifti(identity: tuple[str, str], entry: Entry, with_lungs: bool) -> Volume:
    data = entry.read()
    try:
        if data[:2] == b'\x1f\x8b':
            with gzip.open(io.BytesIO(data)) as file:
                data = file.read(MAX_BYTES + 1)
            if len(data) > MAX_BYTES:
                raise UserError(f'unpacks to more than {MAX_BYTES / 1e9:.0f} GB, taken for a bomb')
        logger = logging.getLogger('nibabel.global')
        before, logger.disabled = logger.disabled, True
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                image = nibabel.Nifti1Image.from_bytes(data)
                shape, affine = image.shape, image.affine
                has_orientation = bool(image.header['sform_code'] or image.header['qform_code'])
                if len(shape) == 4 and shape[3] == 1:
                    shape = shape[:3]
                if len(shape) != 3 or not 0 < np.prod(shape, dtype=float) <= dicom.MAX_VOXELS:
                    raise UserError(
                        f'a NIfTI of shape {shape}: it must be one scan of at most {dicom.MAX_VOXELS:,} voxels'
                    )
                hu = np.empty(shape, np.int16)
                for place in range(shape[2]):
                    hu[..., place] = _round_plane(np.asanyarray(image.dataobj[:, :, place]).reshape(shape[:2]))
        finally:
            logger.disabled = before
        axis = io_orientation(affine)[:, 0].tolist().index(2.0)  # voxel axis along feet to head
        direction = affine[:3, axis]
        upright = abs(direction[2]) / np.linalg.norm(direction)
        spacing = float(np.linalg.norm(direction))
        slices = _orient(hu, affine)
    except UserError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError('a damaged or truncated .nii.gz: copy it again') from error
    except Exception as error:  # damaged headers can raise anything
        raise UserError('a damaged or truncated NIfTI, or not a single-file one: copy it again') from error
    if not upright > 0.8 or not 0 < spacing < np.inf:
        raise UserError('its slices are oblique or its header makes no sense: resample it to axial slices')
    check_hu(slices)
    doubts = [] if has_orientation else ['the NIfTI does not tell its orientation: order and sides are guessed']
    facts = [
        ('voxels', ' x '.join(map(str, shape))),
        ('order', 'turned by its orientation, from head to feet'),
        ('slice distance', f'{spacing:.2f} mm'),
        *_WINDOWED,
    ]
    depths = spacing * np.arange(len(slices))
    lungs = find_lungs_in_scan(slices, _orient_spacing(affine)) if with_lungs else None
    return Volume(*identity, 'NIfTI', [apply_window(s) for s in slices], depths, lungs, facts, [], doubts)


def _round_plane(voxels: np.ndarray) -> np.ndarray:
    """Returns one plane of a NIfTI as int16 Hounsfield units; converting the whole scan takes four times the memory."""
    if voxels.dtype.kind not in 'iuf':
        raise UserError('a NIfTI in colour or of complex numbers: it must hold Hounsfield units')
    if not np.isfinite(voxels).all():
        raise UserError('NaN or infinite voxels: replace them by -1024, the value of air')
    return np.clip(np.round(voxels), *dicom.HU_RANGE).astype(np.int16)


def check_hu(hu: np.ndarray) -> None:
    """Checks that voxels [T, H, W] look like Hounsfield units of a body in air.

    Raises:
      UserError: too little air or soft tissue (2 % each), or too much metal (more than 2 %).
    """
    some = hu[:, ::2, ::2]
    air, tissue, metal = (some < -700).mean(), ((some > -200) & (some < 300)).mean(), (some >= dicom.HU_RANGE[1]).mean()
    if air < _MIN_AIR or tissue < _MIN_TISSUE or metal > _MAX_METAL:
        raise UserError(
            f'values from {some.min()} to {some.max()}, {air:.0%} air and {tissue:.0%} soft tissue, are not the '
            'Hounsfield units of a chest: store true units, or window the slices and pass them as images'
        )


def _read_images(identity: tuple[str, str], entries: Sequence[Entry], notes: list[str]) -> Volume:
    slices, faults, num_pixels = [], [], 0
    for entry in entries:
        try:
            slices.append(_read_image(entry.read()))
        except ValueError as error:
            faults.append(f'{entry.name}: {error}')
        else:
            num_pixels += slices[-1].size
        if num_pixels > dicom.MAX_VOXELS:
            raise UserError(f'images of more than {dicom.MAX_VOXELS:,} pixels: name the folder of one scan')
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
        [
            ('images', f'{len(slices)}, {", ".join(f"{n} of {w} x {h}" for (h, w), n in sizes.most_common(3))}'),
            ('order', 'of the names, numbers counted; taken to run from head to feet'),
            ('window', 'none applied: images are taken as they are'),
        ],
        notes,
        doubts,
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
