"""Reads the slices of an axial CT from DICOM files: geometry first, pixels in Hounsfield units later.

Only technical attributes are read. Attributes that identify a patient, a physician or a hospital are not.
"""

import contextlib
import io
import logging
import re
import threading
import warnings
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pydicom
import pydicom.config
from pydicom.dataset import Dataset
from pydicom.encaps import get_frame
from pydicom.errors import InvalidDicomError
from pydicom.pixels import pixel_array
from pydicom.uid import (
    UID,
    CTImageStorage,
    EnhancedCTImageStorage,
    LegacyConvertedEnhancedCTImageStorage,
    MediaStorageDirectoryStorage,
)

from covidjax.data.scan.jpeg import check_jpeg
from covidjax.data.scan.sources import MAX_RATIO, Entry

MAX_VOXELS = 400_000_000  # 1,525 slices of 512 x 512
HU_RANGE = (-1024, 3071)  # range of 12 bits; values beyond it are padding or metal
_CT_CLASSES = (CTImageStorage, EnhancedCTImageStorage, LegacyConvertedEnhancedCTImageStorage)
_PROJECTIONS = ('CR', 'DX', 'DR', 'RG', 'RF', 'XA', 'MG', 'PX')
_CHEST = ('CHEST', 'THORAX', 'LUNG', 'HEART')
TRAITS = {  # attributes that tell phases of one series apart, and their sequence in multi-frame files
    'AcquisitionNumber': '',
    'TemporalPositionIdentifier': '',
    'ImageType': '',
    'KVP': '',
    'ContrastBolusAgent': '',
    'TemporalPositionIndex': 'FrameContentSequence',
}
_AXIAL = 0.8  # minimum cosine between slice normal and body axis; the maximum gantry tilt of 30 degrees gives 0.87
_PLAIN, _DEFLATED = b'1.2.840.10008.1.2.1', b'1.2.840.10008.1.2.1.99'
_HEADER = [
    'SOPClassUID',
    'StudyInstanceUID',
    'SeriesInstanceUID',
    'Modality',
    'ImageType',
    'SeriesNumber',
    'InstanceNumber',
    'AcquisitionNumber',
    'TemporalPositionIdentifier',
    'KVP',
    'ContrastBolusAgent',
    'ConvolutionKernel',
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
      label: (study UID, series UID), '' where the header lacks one. Anonymised exports may repeat or change both.
      number: series number.
      instance: instance number; it can be missing or wrong, and serves descriptions only.
      kernel: reconstruction kernel, '' if the header lacks it.
      traits: values that differ between the phases of a series, in the order of `TRAITS`.
      is_elsewhere: the header names a body part other than the chest.
      missing: what the header lacks to be surely a CT: '', 'modality' or 'modality and class'.
      shape: (rows, columns).
      position: of the first pixel in mm, LPS.
      right, down: unit vectors along a row and along a column, LPS.
      spacing: (between rows, between columns) in mm.
      thickness: mm, or None if the header lacks it.
      slope, intercept: HU = slope * stored + intercept.
    """

    entry: Entry
    index: int
    label: tuple[str, str]
    number: int | None
    instance: int | None
    kernel: str
    traits: tuple[str, ...]
    is_elsewhere: bool
    missing: str
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


class LeftOut(Exception):
    """A DICOM file is not a slice of an axial CT. The message is the reason.

    Attributes:
      label: as in `Frame`; None if the header is unreadable.
    """

    label: tuple[str, str] | None = None


_lock, _num_quiet, _speak = threading.Lock(), 0, contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences pydicom. Its messages contain attributes, which may be private, and its decoders log tracebacks.

    These settings are of the process. Of several threads the first one in sets them and the last one out resets them.
    """
    global _num_quiet
    with _lock:
        if not _num_quiet:
            _speak.enter_context(warnings.catch_warnings())
            warnings.simplefilter('ignore')
            _speak.callback(logging.disable, logging.root.manager.disable)
            logging.disable()
            settings = pydicom.config.settings
            _speak.callback(setattr, settings, 'reading_validation_mode', settings.reading_validation_mode)
            settings.reading_validation_mode = pydicom.config.IGNORE
        _num_quiet += 1
    try:
        yield
    finally:
        with _lock:
            _num_quiet -= 1
            if not _num_quiet:
                _speak.close()


def read_frames(entry: Entry, data: bytes) -> list[Frame] | None:
    """Returns the slices of a file, or None if it is not DICOM.

    Raises:
      LeftOut: the file is DICOM but has no slices of an axial CT.
    """
    with quiet():
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
        except Exception as error:
            reason = error if isinstance(error, LeftOut) else LeftOut('damaged')
            reason.label = _get_label(header)
            raise reason from error


def read_label(data: bytes) -> tuple[str, str] | None:
    """Returns study and series UID, '' where missing, from the start of a file; None if it is not readable DICOM."""
    with quiet():
        try:
            header = pydicom.dcmread(
                io.BytesIO(data), stop_before_pixels=True, specific_tags=['StudyInstanceUID', 'SeriesInstanceUID']
            )
        except Exception:  # damaged or cut files can raise anything
            return None
        return _get_label(header)


def read_headers(frames: Sequence[Frame]) -> list[Dataset]:
    """Returns the headers of slices: who the patient is, too. For results that go back into the same study.

    Pixels and private attributes, which may be large, are left out.
    """
    with quiet():
        headers = []
        for frame in frames:
            data = io.BytesIO(_inflate(frame.entry.read()))
            headers.append(pydicom.dcmread(data, stop_before_pixels=True))
            headers[-1].remove_private_tags()
        return headers


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
    modality, kind = _get_text(header, 'Modality'), _get_text(header, 'ImageType')
    sop_class = _get_text(header, 'SOPClassUID') or _get_text(header.file_meta, 'MediaStorageSOPClassUID')
    if sop_class == MediaStorageDirectoryStorage:
        raise LeftOut('DICOMDIR')
    if modality in _PROJECTIONS:
        raise LeftOut('projection X-rays')
    if modality not in ('CT', ''):
        raise LeftOut('not CT')
    if 'LOCALIZER' in kind:
        raise LeftOut('localizers (scouts)')
    is_known = UID(sop_class).name != sop_class  # registered, for another kind of object
    if 'SCREEN SAVE' in kind or (is_known and sop_class not in _CT_CLASSES):
        raise LeftOut('secondary captures' if modality else 'not CT')
    if not modality and 'Rows' not in header:
        raise LeftOut('not CT')
    missing = '' if modality else 'modality' if is_known else 'modality and class'
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
    number, instance = (_get_number(header, name) for name in ('SeriesNumber', 'InstanceNumber'))
    label, part = _get_label(header), _get_text(header, 'BodyPartExamined')
    frames = []
    for index, sources in enumerate(parts):
        position = _find(sources, 'PlanePositionSequence', 'ImagePositionPatient')
        orientation = _find(sources, 'PlaneOrientationSequence', 'ImageOrientationPatient')
        spacing = _find(sources, 'PixelMeasuresSequence', 'PixelSpacing')
        if position is None or orientation is None or spacing is None:
            raise LeftOut('without a position')
        slope = _find(sources, 'PixelValueTransformationSequence', 'RescaleSlope')
        intercept = _find(sources, 'PixelValueTransformationSequence', 'RescaleIntercept')
        orientation = np.array(orientation, float)
        frame = Frame(
            entry=entry,
            index=index,
            label=label,
            number=number,
            instance=instance,
            kernel=re.sub(r'[^\w .+-]', '', _find_text(sources, 'CTReconstructionSequence', 'ConvolutionKernel'))[:24],
            traits=tuple(_find_text(sources, sequence, name) for name, sequence in TRAITS.items()),
            is_elsewhere=bool(part) and not any(name in part.upper() for name in _CHEST),
            missing=missing,
            shape=shape,
            position=np.array(position, float),
            right=orientation[:3],
            down=orientation[3:],
            spacing=(float(spacing[0]), float(spacing[1])),
            thickness=_get_thickness(sources),
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


def _get_label(header: Dataset) -> tuple[str, str]:
    return _get_text(header, 'StudyInstanceUID'), _get_text(header, 'SeriesInstanceUID')


def _get_text(source: Dataset, name: str) -> str:
    """Returns an attribute as text, '' if it is missing, empty or malformed."""
    try:
        value = source.get(name)
        return '' if value is None else str(value).strip(' \0')
    except Exception:
        return ''


def _get_number(source: Dataset, name: str) -> int | None:
    """Returns an attribute as a whole number, None if it is missing, empty or malformed."""
    try:
        return int(_get_text(source, name))
    except ValueError:
        return None


def _get_thickness(sources: Sequence[Dataset]) -> float | None:
    """Returns the thickness in mm to four digits, None if it is missing, empty or malformed."""
    try:
        thickness = float(f'{float(_find_text(sources, "PixelMeasuresSequence", "SliceThickness")):.4g}')
    except ValueError:
        return None
    return thickness if 0 < thickness < np.inf else None


def _find_text(sources: Sequence[Dataset], sequence: str, name: str) -> str:
    """Returns `_find` as text, '' if there is none or it is malformed."""
    try:
        value = _find(sources, sequence, name)
        return '' if value is None else str(value).strip(' \0')
    except Exception:
        return ''


def _find(sources: Sequence[Dataset], sequence: str, name: str):
    """Returns an attribute from the first source that has it (frame, shared groups, file), or None."""
    for source in sources:
        inner = source.get(sequence)
        value = (inner[0] if inner else source).get(name)
        if value is not None and value != '':
            return value
    return None


def compute_planes(frames: Sequence[Frame]) -> Iterator[np.ndarray | Exception]:
    """Yields the pixels of each frame, or the exception of its decoder: int16 [H, W], HU clipped to `HU_RANGE`.

    Only one file is in memory at a time. Frames of one file should follow each other, otherwise it is read again.
    """
    entry, dataset = None, None
    for frame in frames:
        try:
            if dataset is None or frame.entry is not entry:
                entry, dataset = frame.entry, None
                dataset = _read_dataset(entry.read())
            yield _decode(dataset, frame)
        except Exception as error:  # decoders can raise anything
            yield error


def _read_dataset(data: bytes) -> Dataset:
    with quiet():
        return pydicom.dcmread(io.BytesIO(_inflate(data)), specific_tags=[*_HEADER, *_PIXELS])


def _decode(dataset: Dataset, frame: Frame) -> np.ndarray:
    with quiet():
        count = int(dataset.get('NumberOfFrames') or 1)
        if dataset.file_meta.TransferSyntaxUID.is_encapsulated:
            stream = get_frame(dataset.PixelData, frame.index, number_of_frames=count)
            check_jpeg(stream, frame.shape, int(dataset.BitsAllocated))
        stored = pixel_array(dataset, index=frame.index) if count > 1 else dataset.pixel_array
        padding = dataset.get('PixelPaddingValue')
    stored = stored.reshape(frame.shape)
    values = stored.astype(np.float32) * frame.slope + frame.intercept
    if isinstance(padding, int):
        values[stored == padding] = HU_RANGE[0]
    return np.clip(np.round(values), *HU_RANGE).astype(np.int16)
