"""Results that a PACS can read: a report, outlines, the leading map and a page, in the study of the scan.

They carry the patient and the study of the source, so they are made on request only. Needs highdicom, an optional
package: pip install covidjax[dicom].
"""

import importlib.util
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage

import covidjax
from covidjax.data.scan import dicom
from covidjax.data.scan.dicom import quiet
from covidjax.data.scan.sources import open_entries
from covidjax.data.scan.volume import Volume, find_frames
from covidjax.errors import UserError
from covidjax.files import replace_file
from covidjax.predict.dicom_images import compute_top_maps, create_map, create_segments
from covidjax.predict.dicom_page import create_page
from covidjax.predict.dicom_report import MAKER, create_refusal_report, create_report
from covidjax.report.burden import LesionPrediction
from covidjax.report.leading import get_classifier_map
from covidjax.report.prediction import Prediction

NAMES = ('report', 'segments', 'map', 'page')
# Of the patient and study modules, type 2: they may be empty, but must be there.
_EMPTY = (
    'PatientID',
    'PatientName',
    'PatientBirthDate',
    'PatientSex',
    'StudyID',
    'StudyDate',
    'StudyTime',
    'AccessionNumber',
    'ReferringPhysicianName',
)
_HINT = ' (--force'  # doubts end with it, see predict/prepare.py


def check_package() -> None:
    """Raises UserError if highdicom is not installed."""
    if importlib.util.find_spec('highdicom') is None:
        raise UserError("DICOM results need highdicom: pip install 'covidjax[dicom]'")


def describe_maker(results: dict[str, Any], version: str) -> dict[str, str]:
    """Returns the attributes of the equipment module.

    Args:
      results: results.json of the run.
      version: names the run, see `scan.compute_version`.
    """
    return {
        'manufacturer': MAKER,
        'manufacturer_model_name': results['model'],
        'software_versions': covidjax.__version__,
        'device_serial_number': version,
    }


def read_headers(path: Path, series: str | None) -> list[Dataset]:
    """Returns the headers of the slices of a scan, from head to feet, without pixels.

    Args:
      path, series: of the scan, see `volume.read_volume`.

    Raises:
      UserError: it is no DICOM.
    """
    with open_entries(path) as entries:
        try:
            return dicom.read_headers(find_frames(entries, series))
        except UserError as error:
            raise UserError(f'{path}: {error}') from error


def check_headers(headers: Sequence[Dataset]) -> list[Dataset]:
    """Returns headers with the patient and study attributes that DICOM asks for, which may be empty.

    Raises:
      UserError: the headers do not identify the slices.
    """
    uids = [header.get('SOPInstanceUID') for header in headers]
    if len(set(uids)) < len(uids) or not all(uids):
        raise UserError(
            'no DICOM results: the slices have no SOP Instance UIDs, or one twice, so nothing can refer to them'
        )
    if any(header.get('SOPClassUID') != CTImageStorage for header in headers) or not headers[0].get('StudyInstanceUID'):
        raise UserError('no DICOM results: the slices are not single CT images of a study')
    for header in headers:
        for name in _EMPTY:
            if name not in header:
                setattr(header, name, None if name in ('StudyDate', 'StudyTime') else '')
    return list(headers)


def create_results(
    headers: Sequence[Dataset],
    volume: Volume,
    prediction: Prediction | LesionPrediction,
    results: dict[str, Any],
    maker: dict[str, str],
) -> dict[str, bytes]:
    """Returns the DICOM files of a prediction by name, of `NAMES`.

    'report' and 'page' are always there, 'segments' if a lesion model found lungs, 'map' if the run has a leading map.
    The latter two need a frame of reference.

    Args:
      headers: of the T slices of the scan, from head to feet, without pixels.
      volume: the scan; of its slices, one is enough.
      prediction: of the scan.
      results: results.json of the run.
      maker: see `describe_maker`.

    Raises:
      UserError: the headers do not identify the slices.
    """
    headers = check_headers(headers)
    shown = None if isinstance(prediction, LesionPrediction) else get_classifier_map(results)
    maps_RxSxS = None if shown is None else compute_top_maps(prediction, shown)
    found: dict[str, Dataset | None] = {}
    with quiet():  # highdicom's messages quote attributes
        if headers[0].get('FrameOfReferenceUID'):
            if prediction.outlined is not None:
                found['segments'] = create_segments(headers, volume, prediction.outlined, maker)
            if maps_RxSxS is not None:
                found['map'] = create_map(headers, volume, prediction, maps_RxSxS, shown, maker)
        found['report'] = create_report(headers, prediction, found.get('segments'), maker)
        found['page'] = create_page(headers, prediction, maps_RxSxS, shown, maker)
        return {name: _encode(dataset) for name, dataset in found.items() if dataset is not None}


def create_refusal(headers: Sequence[Dataset], reason: str, maker: dict[str, str]) -> dict[str, bytes]:
    """Returns the 'report' of a scan that was refused.

    Args:
      headers: of its slices, without pixels.
      reason: message of the refusal.
      maker: see `describe_maker`.

    Raises:
      UserError: the headers do not identify the slices.
    """
    headers = check_headers(headers)
    reason = reason.partition(_HINT)[0].rstrip('.')
    reason += '' if reason.endswith('?') else '.'
    with quiet():
        return {'report': _encode(create_refusal_report(headers, f'{reason[0].upper()}{reason[1:]}', maker))}


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes DICOM files to a folder, which is made if it is missing. Deletes those of an earlier prediction."""
    folder.mkdir(exist_ok=True)
    for name in NAMES:
        path = folder / f'{name}.dcm'
        if name not in files:
            path.unlink(missing_ok=True)
            continue
        with replace_file(path) as temporary:
            temporary.write_bytes(files[name])


def _encode(dataset: Dataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
