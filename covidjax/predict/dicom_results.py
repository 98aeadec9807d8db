"""Results that a PACS can read: a structured report, the leading map and a page, in the study of the scan.

They carry the patient and the study of the source, so they are made on request only. Needs highdicom, an optional
package: pip install covidjax[dicom].

Shapes: T slices of a scan, H rows, W columns, N slices that the model saw, S their side.
"""

import importlib.util
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sr.codedict import Code, codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

import covidjax
from covidjax.data.lists import CLASSES
from covidjax.data.preprocess import Box
from covidjax.data.scan.dicom import Frame, quiet, read_identity
from covidjax.data.scan.sources import open_entries
from covidjax.data.scan.volume import find_frames, turn_back, turn_upright
from covidjax.errors import UserError
from covidjax.explain import catalogue
from covidjax.files import replace_file
from covidjax.report.charts import COLOURS, use_style
from covidjax.report.leading import get_shown_map
from covidjax.report.prediction import Prediction, build_headline, describe_windows

USE = 'Research use only. Not a medical device; do not use it in the care of patients.'
MAKER = 'covidjax'
# SNOMED CT, https://browser.ihtsdotools.org
FINDINGS = {
    'normal': Code('17621005', 'SCT', 'Normal'),
    'pneumonia': Code('233604007', 'SCT', 'Pneumonia'),
    'covid19': Code('840539006', 'SCT', 'COVID-19'),
    'uncertain': Code('64957009', 'SCT', 'Uncertain'),
}
_CHEST_CT = Code('169069000', 'SCT', 'CT of chest')
_BODY_PART = 'CHEST'  # no paired organ, so that there is no laterality
_EVALUATIONS = Code('C0034375', 'UMLS', 'Qualitative Evaluations')
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
_SERIES = {'report': 9001, 'map': 9002, 'page': 9003}  # series numbers
_MAP_MAX = 65_535  # stored value of 1
_PAGE_INCHES, _PAGE_DPI = (8.3, 10.5), 110


def check_package() -> None:
    """Raises UserError if highdicom is not installed."""
    if importlib.util.find_spec('highdicom') is None:
        raise UserError("DICOM results need highdicom: pip install 'covidjax[dicom]'")


def create_objects(
    headers: Sequence[Dataset],
    frames: Sequence[Frame],
    prediction: Prediction,
    results: dict[str, Any],
    version: str,
) -> dict[str, Dataset]:
    """Returns the DICOM objects of a prediction by name: 'report', 'page' and, if the run has a leading map, 'map'.

    Args:
      headers: of the T slices of the scan, from head to feet, without pixels.
      frames: their geometry.
      prediction: of the scan.
      results: results.json of the run.
      version: names the run, see `archive.compute_version`.

    Raises:
      UserError: the headers do not identify the slices.
    """
    if 'probabilities' not in prediction.summary:
        raise UserError('no DICOM results: this model gives no verdict')
    headers = [_complete(header) for header in headers]
    uids = [header.get('SOPInstanceUID') for header in headers]
    if len(set(uids)) < len(uids) or not all(uids):
        raise UserError(
            'no DICOM results: the slices have no SOP Instance UIDs, or one twice, so nothing can refer to them'
        )
    if any(header.SOPClassUID != CTImageStorage for header in headers) or not headers[0].get('StudyInstanceUID'):
        raise UserError('no DICOM results: the slices are not single CT images of a study')
    maker = {
        'manufacturer': MAKER,
        'manufacturer_model_name': results['model'],
        'software_versions': covidjax.__version__,
        'device_serial_number': version,
    }
    found = {'report': create_report(headers, prediction, maker)}
    shown = get_shown_map(results)
    if shown is not None and shown.startswith(catalogue.LESIONS):
        shown = None  # it is no map of the classifier
    maps_RxSxS = None if shown is None else _compute_top_maps(prediction, shown)
    if maps_RxSxS is not None and headers[0].get('FrameOfReferenceUID'):
        found['map'] = create_map(headers, frames, prediction, maps_RxSxS, shown, maker)
    found['page'] = create_page(headers, prediction, maps_RxSxS, shown, maker)
    return found


def write_results(
    folder: Path, path: Path, series: str | None, prediction: Prediction, results: dict[str, Any], version: str
) -> None:
    """Writes report.dcm, map.dcm and page.dcm of a prediction.

    Args:
      folder: where they go; made if it is missing.
      path, series: of the scan, see `volume.read_volume`.
      prediction, results, version: see `create_objects`.

    Raises:
      UserError: highdicom is not installed, the scan is no DICOM, or its headers do not identify the slices.
    """
    check_package()
    with open_entries(path) as entries:
        try:
            frames = find_frames(entries, series)
            headers = [read_identity(frame.entry.read()) for frame in frames]
            with quiet():  # highdicom's messages quote attributes
                objects = create_objects(headers, frames, prediction, results, version)
        except UserError as error:
            raise UserError(f'{path}: {error}') from error
    folder.mkdir(exist_ok=True)
    for name, dataset in objects.items():
        with replace_file(folder / f'{name}.dcm') as temporary:
            dataset.save_as(temporary, enforce_file_format=True)


def _complete(header: Dataset) -> Dataset:
    for name in _EMPTY:
        if name not in header:
            setattr(header, name, None if name in ('StudyDate', 'StudyTime') else '')
    return header


def _get_top(headers: Sequence[Dataset], prediction: Prediction) -> list[Dataset]:
    return [headers[number - 1] for number in prediction.summary['rests_on']]


# ---------------------------------------------------------------------------------------------------------------------
# Structured report


def create_report(headers: Sequence[Dataset], prediction: Prediction, maker: dict[str, str]) -> Dataset:
    """Returns a Comprehensive SR by TID 1500: a group of measurements for each class, and the verdict in words."""
    from highdicom import sr

    summary = prediction.summary
    algorithm = sr.AlgorithmIdentification(
        name=f'{MAKER} {maker["manufacturer_model_name"]}',
        version=maker['software_versions'],
        parameters=[f'run {maker["device_serial_number"]}', f'trained on {summary["trained_on"]}'],
        manufacturer=MAKER,
    )
    site = sr.FindingSite(codes.SCT.Lung)
    sources = [sr.SourceImageForMeasurementGroup.from_source_image(header) for header in _get_top(headers, prediction)]
    groups = []
    for name, share in summary['probabilities'].items():
        probability = sr.Measurement(codes.DCM.Probability, round(100 * share, 2), codes.UCUM.Percent)
        groups.append(
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(identifier=f'Probability of {name}'),
                finding_type=FINDINGS[name],
                algorithm_id=algorithm,
                finding_sites=[site],
                measurements=[probability],
                source_images=sources,
            )
        )
    device = sr.ObserverContext(
        codes.DCM.Device,
        sr.DeviceObserverIdentifyingAttributes(
            uid=generate_uid(),
            name=MAKER,
            manufacturer_name=MAKER,
            model_name=maker['manufacturer_model_name'],
            serial_number=maker['device_serial_number'],
        ),
    )
    context = sr.ObservationContext(observer_device_context=device)
    content = sr.MeasurementReport(context, _CHEST_CT, groups)
    content[0].ContentSequence.append(_create_evaluations(summary))
    report = sr.ComprehensiveSR(
        evidence=headers,
        content=content[0],
        series_instance_uid=generate_uid(),
        series_number=_SERIES['report'],
        sop_instance_uid=generate_uid(),
        instance_number=1,
        is_complete=True,
        series_description=f'{MAKER}: report (research use only)',
        **maker,
    )
    return report


def _create_evaluations(summary: dict[str, Any]) -> Dataset:
    """Returns rows 12 to 14 of TID 1500: the verdict as a code, and all doubts as text."""
    from highdicom import sr

    contains = sr.RelationshipTypeValues.CONTAINS
    container = sr.ContainerContentItem(name=_EVALUATIONS, relationship_type=contains)
    container.ContentSequence = sr.ContentSequence(
        [sr.CodeContentItem(codes.DCM.Finding, FINDINGS[summary['verdict']], contains)]
        + [sr.TextContentItem(codes.DCM.Comment, text, contains) for text in list_sentences(summary)]
    )
    return container


def list_sentences(summary: dict[str, Any]) -> list[str]:
    """Returns what a reader of the report must know, most important first."""
    sentences = [USE]
    if summary['notice']:
        sentences.append(f'The model was trained on {summary["notice"]}: its verdict says nothing about a patient.')
    sentences += [f'Predicted in spite of: {doubt}.' for doubt in summary['forced']]
    sentences.append(build_headline(summary))
    if summary['conformal'] is not None:
        sentences += summary['conformal']['notes']
    members, novelty = summary['members'], summary['novelty']
    if members is not None:
        sentences.append(f'The members of the ensemble disagree by {members["disagreement"]:.3f}.')
    if summary['windows'] is not None:
        sentences.append(f'Under several grey windows: {describe_windows(summary["windows"])}')
    if novelty is not None:
        sentences.append(
            f'The median slice is at {novelty["median"]:.2f} of the threshold of what is unlike the training data; '
            f'{novelty["share_unusual"]:.0%} of the slices are beyond it.'
        )
    sentences += [f'{warning[0].upper()}{warning[1:]}.' for warning in summary['warnings']]
    numbers = ', '.join(map(str, summary['rests_on']))
    sentences.append(f'The verdict rests on slices {numbers} of {summary["input"]["num_slices"]}, from head to feet.')
    return sentences


# ---------------------------------------------------------------------------------------------------------------------
# Map


def _compute_top_maps(prediction: Prediction, name: str) -> np.ndarray:
    """Returns the leading map of the slices that the verdict rests on, float [R, S, S] in [0, 1]."""
    places = _get_places(prediction)
    explained = jax.tree.map(lambda of_slices: of_slices[places], prediction.explained)
    images = prediction.images[places]
    maps = catalogue.compute_maps(explained, images.shape[1], prediction.combination)
    whole = name.removesuffix(catalogue.IN_LUNGS)
    if whole != name:
        maps = catalogue.restrict({whole: maps[whole]}, catalogue.find_lungs(images[..., np.newaxis]))
    return maps[name]


def _get_places(prediction: Prediction) -> np.ndarray:
    return np.searchsorted(prediction.used, np.array(prediction.summary['rests_on']) - 1)


def place_map(map_SxS: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Returns a map in [0, 1] of a crop as uint16 [H, W] of the whole slice, 0 outside the crop."""
    left, top, right, bottom = box
    crop = Image.fromarray(map_SxS.astype(np.float32)).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    whole = Image.new('F', shape[::-1])
    whole.paste(crop, (left, top))
    return (np.asarray(whole) * _MAP_MAX).round().astype(np.uint16)


def create_map(
    headers: Sequence[Dataset],
    frames: Sequence[Frame],
    prediction: Prediction,
    maps_RxSxS: np.ndarray,
    name: str,
    maker: dict[str, str],
) -> Dataset:
    """Returns a parametric map of the slices that the verdict rests on, in their geometry; saliency from 0 to 1."""
    from highdicom import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping

    numbers = prediction.summary['rests_on']
    # A scan is turned to stand upright; the map must lie on the slices as they are stored.
    upright = turn_upright(np.zeros(frames[0].shape, bool), frames).shape
    pixels = np.stack(
        [
            turn_back(place_map(map_SxS, prediction.boxes[number - 1], upright), frames)
            for map_SxS, number in zip(maps_RxSxS, numbers, strict=True)
        ]
    )
    mapping = RealWorldValueMapping(
        lut_label='saliency',
        lut_explanation='Map of what the model weighed, scaled to 0..1'[:64],
        unit=codes.UCUM.NoUnits,
        value_range=(0, _MAP_MAX),
        slope=1 / _MAP_MAX,
        intercept=0.0,
        quantity_definition=codes.DCM.Saliency,
    )
    parametric = ParametricMap(
        source_images=_get_top(headers, prediction),
        pixel_array=pixels,
        series_instance_uid=generate_uid(),
        series_number=_SERIES['map'],
        sop_instance_uid=generate_uid(),
        instance_number=1,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[VOILUTTransformation(window_center=_MAP_MAX / 2, window_width=_MAP_MAX)],
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label='SALIENCY',
        content_description=name[:64],
        series_description=f'{MAKER}: map (research use only)',
        **maker,
    )
    parametric.BodyPartExamined = _BODY_PART
    return parametric


# ---------------------------------------------------------------------------------------------------------------------
# Page


def create_page(
    headers: Sequence[Dataset],
    prediction: Prediction,
    maps_RxSxS: np.ndarray | None,
    name: str | None,
    maker: dict[str, str],
) -> Dataset:
    """Returns a page of the verdict and the slices it rests on, as a secondary capture in colour."""
    from highdicom.sc import SCImage

    figure = _render_page(prediction, maps_RxSxS, name)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3])
    page = SCImage.from_ref_dataset(
        headers[0],
        pixels,
        photometric_interpretation='RGB',
        bits_allocated=8,
        coordinate_system='PATIENT',
        patient_orientation=('L', 'P'),
        series_instance_uid=generate_uid(),
        series_number=_SERIES['page'],
        sop_instance_uid=generate_uid(),
        instance_number=1,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        series_description=f'{MAKER}: page (research use only)',
        **maker,
    )
    page.SourceImageSequence = []
    for header in _get_top(headers, prediction):
        reference = Dataset()
        reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
        page.SourceImageSequence.append(reference)
    page.BodyPartExamined = _BODY_PART
    page.BurnedInAnnotation = 'NO'  # its text identifies nobody
    return page


def _render_page(prediction: Prediction, maps_RxSxS: np.ndarray | None, name: str | None) -> Figure:
    summary, places = prediction.summary, _get_places(prediction)
    with use_style():
        figure = Figure(figsize=_PAGE_INCHES, dpi=_PAGE_DPI, facecolor='white', layout='constrained')
        words, bars, pictures = figure.subfigures(3, 1, height_ratios=(3.4, 1.6, 5.5))
        words.text(0.02, 0.97, f'{MAKER}: {summary["verdict"]}', va='top', fontsize=18, weight='bold', color='black')
        lines = [textwrap.fill(sentence, 96) for sentence in list_sentences(summary)]
        words.text(0.02, 0.8, '\n'.join(lines), va='top', fontsize=9, color='black')
        axes = bars.subplots()
        shares = [summary['probabilities'][one] for one in CLASSES]
        axes.barh(CLASSES, shares, color=[COLOURS[one] for one in CLASSES])
        for row, share in enumerate(shares):
            axes.text(min(share, 0.93) + 0.01, row, f'{share:.3f}', va='center', color='black')
        axes.set(xlim=(0, 1), xlabel='Probability')
        axes.invert_yaxis()
        axes.tick_params(colors='black')
        axes.xaxis.label.set_color('black')
        rows = 1 if maps_RxSxS is None else 2
        grid = pictures.subplots(rows, len(places), squeeze=False)
        for column, place in enumerate(places):
            grid[0][column].imshow(prediction.images[place], cmap='gray', vmin=0, vmax=255)
            grid[0][column].set_title(f'slice {prediction.used[place] + 1}', fontsize=9, color='black')
            if maps_RxSxS is not None:
                grid[1][column].imshow(prediction.images[place], cmap='gray', vmin=0, vmax=255)
                grid[1][column].imshow(maps_RxSxS[column], cmap='inferno', vmin=0, vmax=1, alpha=0.55)
        for axes in grid.ravel():
            axes.axis('off')
        if name is not None:
            pictures.supxlabel(f'Below: {name}; what the model weighed, not a lesion', fontsize=9, color='black')
        return figure
