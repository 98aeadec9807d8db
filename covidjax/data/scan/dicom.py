"""Finds CT series in DICOM files, selects one and loads its pixels in Hounsfield units, ordered by position.

Only technical attributes are read. Attributes that identify a patient, a physician or a hospital are not.
"""

import contextlib
import io
import logging
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pydicom
import pydicom.config
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage

from covidjax.data.scan.sources import MAX_RATIO, Entry
from covidjax.errors import UserError, join_faults

MAX_VOXELS = 400_000_000  # 1,525 slices of 512 x 512
HU_RANGE = (-1024, 3071)  # range of 12 bits; values beyond it are padding or metal
_CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_PROJECTIONS = ('CR', 'DX', 'DR', 'RG', 'RF', 'XA', 'MG', 'PX')
_CHEST = ('CHEST', 'THORAX', 'LUNG', 'HEART')
_AXIAL = 0.8  # minimum cosine between slice normal and body axis; the maximum gantry tilt of 30 degrees gives 0.87
_SAME_MM = 1e-3
_PLAIN, _DEFLATED = b'1.2.840.10008.1.2.1', b'1.2.840.10008.1.2.1.99'
_HEADER = [
    'SOPClassUID',
    'SOPInstanceUID',
    'StudyInstanceUID',
    'SeriesInstanceUID',
    'Modality',
    'ImageType',
    'SeriesNumber',
    'BodyPartExamined',
    'SliceThickness',
    'ImagePositionPatient',
    'ImageOrientationPatient',
    'PixelSpacing',
    'RescaleSlope',
    'RescaleIntercept',
    'SharedFunctionalGroupsSequence',
    'PerFrameFunctionalGroupsSequence',
    'NumberOfFrames',
    'SamplesPerPixel',
    'PhotometricInterpretation',
    'Rows',
    'Columns',
    'BitsAllocated',
    'BitsStored',
    'HighBit',
    'PixelRepresentation',
    'PixelPaddingValue',
]
_PIXELS = ['PixelData', 'ExtendedOffsetTable', 'ExtendedOffsetTableLengths']


class Frame(NamedTuple):
    """One slice of a file: its geometry and the conversion of its pixels to Hounsfield units.

    Attributes:
      entry: the file.
      index: slice number in the file.
      uid: SOP instance UID, the same in copies of a file.
      study, series, number: study UID, series UID and series number.
      is_elsewhere: the header names a body part other than the chest.
      shape: (rows, columns).
      position: of the first pixel in mm, LPS.
      right, down: unit vectors along a row and along a column, LPS.
      spacing: (between rows, between columns) in mm.
      thickness: mm, or None if the header lacks it.
      slope, intercept: HU = slope * stored + intercept.
    """

    entry: Entry
    index: int
    uid: str
    study: str
    series: str
    number: int | None
    is_elsewhere: bool
    shape: tuple[int, int]
    position: np.ndarray
    right: np.ndarray
    down: np.ndarray
    spacing: tuple[float, float]
    thickness: float | None
    slope: float
    intercept: float

    @property
    def normal(self) -> np.ndarray:
        """Unit normal of the slice, pointing to the head."""
        normal = np.cross(self.right, self.down)
        return normal if normal[2] >= 0 else -normal


class Series(NamedTuple):
    """Slices of one series, orientation and size.

    Attributes:
      name: value of --series that selects it.
      frames: slices from head to feet.
    """

    name: str
    frames: list[Frame]

    def describe(self) -> str:
        """Returns e.g. 'series 4: 148 slices of 512 x 512, 2 mm thick'."""
        first = self.frames[0]
        count = f'{len(self.frames)} slice{"s" if len(self.frames) > 1 else ""}'
        thickness = f', {first.thickness:g} mm thick' if first.thickness else ''
        return f'series {self.name}: {count} of {first.shape[1]} x {first.shape[0]}{thickness}'


class LeftOut(Exception):
    """A DICOM file is not a slice of an axial CT. The message is the reason."""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences pydicom. Its messages contain attributes, which may be private, and its decoders log tracebacks."""
    level, mode = logging.root.manager.disable, pydicom.config.settings.reading_validation_mode
    logging.disable()
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
        pydicom.config.settings.reading_validation_mode = mode


def read_frames(entry: Entry, data: bytes) -> list[Frame] | None:
    """Returns the slices of a file, or None if it is not DICOM.

    Raises:
      LeftOut: the file is DICOM but has no slices of an axial CT.
    """
    with _quiet():
        try:
            file = io.BytesIO(_inflate(data))
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_HEADER)
        except InvalidDicomError:
            return None
        except LeftOut:
            raise
        except Exception as error:  # damaged files can raise anything
            raise LeftOut('damaged') from error
        try:
            return _read_frames(entry, header)
        except LeftOut:
            raise
        except Exception as error:
            raise LeftOut('damaged') from error


def _inflate(data: bytes) -> bytes:
    """Converts a file from the deflated to the plain transfer syntax; returns other files unchanged.

    This limits the inflated size, which pydicom does not.
    """
    start = 144 + int.from_bytes(data[140:144], 'little')  # the header before names the transfer syntax
    head = data[:start]
    if _DEFLATED not in head:
        return data
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    body = inflater.decompress(data[start:], min(MAX_RATIO * len(data), 4 * MAX_VOXELS))
    if not inflater.eof:
        raise LeftOut(f'truncated, or inflate to more than {MAX_RATIO} times their size')
    return head.replace(_DEFLATED, _PLAIN.ljust(len(_DEFLATED), b'\0')) + body


def _read_frames(entry: Entry, header: Dataset) -> list[Frame]:
    modality, kinds = header.get('Modality', ''), [str(kind) for kind in header.get('ImageType') or ()]
    if modality in _PROJECTIONS:
        raise LeftOut('projection X-rays')
    if modality != 'CT':
        raise LeftOut('not CT')
    if 'LOCALIZER' in kinds:
        raise LeftOut('localizers (scouts)')
    if header.get('SOPClassUID') not in _CT_CLASSES or 'SCREEN SAVE' in kinds:
        raise LeftOut('secondary captures')
    if header.get('SamplesPerPixel') != 1 or header.get('PhotometricInterpretation') != 'MONOCHROME2':
        raise LeftOut('in colour or inverted')
    shape = int(header.Rows), int(header.Columns)
    count = int(header.get('NumberOfFrames') or 1)
    if min(*shape, count) < 1 or count * shape[0] * shape[1] > MAX_VOXELS:
        raise LeftOut('of impossible size')
    groups = header.get('PerFrameFunctionalGroupsSequence')
    if groups is None:
        if count > 1:
            raise LeftOut('of several frames without positions')
        parts = [[header]]
    else:
        shared = header.get('SharedFunctionalGroupsSequence') or [Dataset()]
        parts = [[group, shared[0], header] for group in groups]
        if len(parts) != count:
            raise LeftOut('damaged')
    number = header.get('SeriesNumber')
    part = header.get('BodyPartExamined') or ''
    frames = []
    for index, sources in enumerate(parts):
        position = _find(sources, 'PlanePositionSequence', 'ImagePositionPatient')
        orientation = _find(sources, 'PlaneOrientationSequence', 'ImageOrientationPatient')
        spacing = _find(sources, 'PixelMeasuresSequence', 'PixelSpacing')
        if position is None or orientation is None or spacing is None:
            raise LeftOut('without a position')
        thickness = _find(sources, 'PixelMeasuresSequence', 'SliceThickness')
        slope = _find(sources, 'PixelValueTransformationSequence', 'RescaleSlope')
        intercept = _find(sources, 'PixelValueTransformationSequence', 'RescaleIntercept')
        orientation = np.array(orientation, float)
        frame = Frame(
            entry=entry,
            index=index,
            uid=str(header.SOPInstanceUID),
            study=str(header.get('StudyInstanceUID', '')),
            series=str(header.get('SeriesInstanceUID', '')),
            number=None if number is None else int(number),
            is_elsewhere=bool(part) and not any(name in part.upper() for name in _CHEST),
            shape=shape,
            position=np.array(position, float),
            right=orientation[:3],
            down=orientation[3:],
            spacing=(float(spacing[0]), float(spacing[1])),
            thickness=float(thickness) if thickness else None,
            slope=1.0 if slope is None else float(slope),
            intercept=0.0 if intercept is None else float(intercept),
        )
        numbers = np.hstack([frame.position, orientation, frame.spacing, frame.slope, frame.intercept])
        axes = np.array([frame.right, frame.down])
        # All numbers must be finite, and the two directions orthonormal.
        sound = numbers.shape == (13,) and np.isfinite(numbers).all() and np.abs(axes @ axes.T - np.eye(2)).max() < 0.01
        if not sound or min(frame.spacing) <= 0 or frame.slope == 0:
            raise LeftOut('damaged')
        if frame.normal[2] < _AXIAL:
            raise LeftOut('not axial')
        frames.append(frame)
    return frames


def _find(sources: Sequence[Dataset], sequence: str, name: str):
    """Returns an attribute from the first source that has it (frame, shared groups, file), or None."""
    for source in sources:
        inner = source.get(sequence)
        value = (inner[0] if inner else source).get(name)
        if value is not None and value != '':
            return value
    return None


def group_series(frames: Sequence[Frame]) -> list[Series]:
    """Groups slices by series, orientation and size, each group from head to feet and without copies of a file."""
    groups: dict[tuple, dict[tuple, Frame]] = {}
    for frame in frames:
        key = (frame.study, frame.series, frame.shape, *np.round([*frame.right, *frame.down], 2) + 0.0)
        groups.setdefault(key, {}).setdefault((frame.uid, frame.index), frame)
    numbers = Counter(next(iter(group.values())).number for group in groups.values())
    seen, series = Counter(), []
    for key in sorted(groups):
        members = list(groups[key].values())
        normal, number = members[0].normal, members[0].number
        members.sort(key=lambda frame, normal=normal: -float(frame.position @ normal))
        name = '?' if number is None else str(number)
        if numbers[number] > 1:
            name += chr(ord('a') + seen[number]) if seen[number] < 26 else f'-{seen[number]}'
            seen[number] += 1
        series.append(Series(name, members))
    return series


def choose_series(series: Sequence[Series], wanted: str | None) -> Series:
    """Returns the series named `wanted`, or by default the one with the most slices, preferring series of the chest.

    Raises:
      UserError: no series has that name, or `wanted` is None and there are several studies.
    """
    names = '; '.join(one.describe() for one in series)
    if wanted is not None:
        found = [one for one in series if one.name == wanted]
        if not found:
            raise UserError(f'no axial CT series {wanted!r}: pass one of --series={", ".join(s.name for s in series)}')
        return found[0]
    if len({one.frames[0].study for one in series}) > 1:
        raise UserError(f'slices of several studies, choose one with --series: {names}')
    return min(series, key=lambda one: (one.frames[0].is_elsewhere, -len(one.frames)))


def load_series(series: Series) -> tuple[np.ndarray, list[Frame], list[str]]:
    """Reads the pixels of a series.

    Returns:
      int16 [T, H, W] in Hounsfield units, clipped to `HU_RANGE`, from head to feet; the T frames; notes on duplicates.

    Raises:
      UserError: damaged files, more than `MAX_VOXELS`, or different images at one position.
    """
    rows, columns = series.frames[0].shape
    if len(series.frames) * rows * columns > MAX_VOXELS:
        raise UserError(f'{series.describe()}: more than {MAX_VOXELS:,} voxels, choose another with --series')
    hu = np.empty((len(series.frames), rows, columns), np.int16)
    places, faults = {}, []
    for place, frame in enumerate(series.frames):
        places.setdefault(frame.entry.name, []).append((place, frame))
    for name, members in places.items():
        entry = members[0][1].entry
        try:
            stored, padding = _decode(entry.read())
            for place, frame in members:
                values = stored[frame.index].astype(np.float32) * frame.slope + frame.intercept
                if padding is not None:
                    values[stored[frame.index] == padding] = HU_RANGE[0]
                hu[place] = np.clip(np.round(values), *HU_RANGE)
        except Exception as error:  # decoders can raise anything
            faults.append(f'{name} ({type(error).__name__})')
    if faults:
        raise UserError(f'slices that cannot be decoded, copy them again or leave them out: {join_faults(faults)}')
    kept, notes = [0], []
    for place in range(1, len(hu)):
        last = series.frames[kept[-1]]
        if abs(float((series.frames[place].position - last.position) @ last.normal)) > _SAME_MM:
            kept.append(place)
        elif not np.array_equal(hu[place], hu[kept[-1]]):
            raise UserError(f'series {series.name} holds different pictures of one place: keep those of one phase')
    if len(kept) < len(hu):
        notes.append(f'{len(hu) - len(kept)} slices stood there twice and were left out')
    return hu[kept], [series.frames[place] for place in kept], notes


def _decode(data: bytes) -> tuple[np.ndarray, int | None]:
    """Returns the stored pixels [F, H, W] of a file, F frames, and the padding value or None."""
    with _quiet():
        dataset = pydicom.dcmread(io.BytesIO(_inflate(data)), specific_tags=[*_HEADER, *_PIXELS])
        pixels = dataset.pixel_array
        padding = dataset.get('PixelPaddingValue')
    expected = int(dataset.get('NumberOfFrames') or 1), int(dataset.Rows), int(dataset.Columns)
    return pixels.reshape(expected), padding if isinstance(padding, int) else None


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
