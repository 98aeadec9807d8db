"""DICOM images on the slices of a scan: its outlines as segments, and the leading map. Needs highdicom.

Shapes: T slices of a scan, H rows, W columns, R slices that the verdict rests on, S side of a slice for the model.
"""

from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from covidjax.data.preprocess import Box
from covidjax.data.scan.volume import Volume, restore_planes
from covidjax.explain import catalogue
from covidjax.predict.dicom_codes import create_code
from covidjax.predict.dicom_report import MAKER, SEGMENTS
from covidjax.predict.masks import create_labels
from covidjax.report.burden import Outlined
from covidjax.report.prediction import Prediction

_MAP_SERIES, _SEGMENTS_SERIES = 9002, 9004  # series numbers
_MAP_MAX = 65_535  # stored value of 1
_BODY_PART = 'CHEST'  # no paired organ, so that there is no laterality
_COLOURS = {'lungs': (80, 190, 255), 'lesion': (255, 90, 77), 'consolidation': (255, 210, 60)}  # as on the page


def create_segments(
    headers: Sequence[Dataset], volume: Volume, outlined: Outlined, maker: dict[str, str]
) -> Dataset | None:
    """Returns the outlines of a scan as a binary segmentation of the slices with lungs; None if there are no lungs.

    Its segments are `dicom_report.SEGMENTS`. They overlap, as the volumes in the report do: lungs hold the lesions, and
    lesions hold the consolidation. A segment may be empty.

    Args:
      headers: of the T slices of the scan, from head to feet.
      volume: the scan; of its slices, one is enough.
      outlined: its outlines.
      maker: see `dicom_results.describe_maker`.
    """
    from highdicom.color import CIELabColor
    from highdicom.content import AlgorithmIdentificationSequence
    from highdicom.seg import Segmentation, SegmentDescription

    shapes = [volume.slices[0].shape] * len(headers)
    labels = create_labels(outlined.probabilities, outlined.burden, volume.lungs, shapes)
    places = [place for place, of_slice in enumerate(labels) if of_slice.any()]
    if not places:
        return None
    labels_TxHxW = restore_planes(np.stack([labels[place] for place in places]), volume.affine)
    lesions = outlined.summary
    algorithm = AlgorithmIdentificationSequence(
        name=f'{MAKER} {lesions["model"]}'[:64],
        family=codes.DCM.ArtificialIntelligence,
        version=maker['software_versions'],
        source=MAKER,
        parameters={'weights': lesions['digest'][:12], 'threshold': f'{lesions["threshold"]:g}'},
    )
    structure, abnormal = codes.SCT.AnatomicalStructure, codes.SCT.MorphologicallyAbnormalStructure
    segments = Segmentation(
        source_images=[headers[place] for place in places],
        pixel_array=np.stack([labels_TxHxW >= value for value in (1, 2, 3)], axis=-1),
        segmentation_type='BINARY',
        segment_descriptions=[
            SegmentDescription(
                segment_number=number,
                segment_label=name.capitalize(),
                segmented_property_category=structure if name == 'lungs' else abnormal,
                segmented_property_type=create_code(name),
                algorithm_type='AUTOMATIC',
                algorithm_identification=algorithm,
                tracking_uid=generate_uid(),
                tracking_id=name,
                anatomic_regions=None if name == 'lungs' else [create_code('lungs')],
                display_color=CIELabColor.from_rgb(*_COLOURS[name]),
            )
            for number, name in enumerate(SEGMENTS, 1)
        ],
        series_instance_uid=generate_uid(),
        series_number=_SEGMENTS_SERIES,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        content_label='LUNGS_LESIONS',
        content_description='Lungs, lesions and consolidation',
        series_description=f'{MAKER}: lungs and lesions (research use only)',
        **maker,
    )
    segments.BodyPartExamined = _BODY_PART
    return segments


def compute_top_maps(prediction: Prediction, name: str) -> np.ndarray:
    """Returns the map `name` of the slices that the verdict rests on, float [R, S, S] in [0, 1]."""
    places = prediction.get_top_places()
    explained = jax.tree.map(lambda of_slices: of_slices[places], prediction.explained)
    return catalogue.compute_map(name, explained, prediction.images[places], prediction.combination)


def place_map(map_SxS: np.ndarray, box: Box, shape: tuple[int, int]) -> np.ndarray:
    """Returns a map in [0, 1] of a crop as uint16 [H, W] of the whole slice, 0 outside the crop."""
    left, top, right, bottom = box
    crop = Image.fromarray(map_SxS.astype(np.float32)).resize((right - left, bottom - top), Image.Resampling.BILINEAR)
    whole = Image.new('F', shape[::-1])
    whole.paste(crop, (left, top))
    return (np.asarray(whole) * _MAP_MAX).round().astype(np.uint16)


def create_map(
    headers: Sequence[Dataset],
    volume: Volume,
    prediction: Prediction,
    maps_RxSxS: np.ndarray,
    name: str,
    maker: dict[str, str],
) -> Dataset:
    """Returns a parametric map of the slices that the verdict rests on, in their geometry; saliency from 0 to 1."""
    from highdicom import VOILUTTransformation
    from highdicom.pm import ParametricMap, RealWorldValueMapping

    numbers, shape = prediction.summary['rests_on'], volume.slices[0].shape
    placed = [
        place_map(map_SxS, prediction.boxes[number - 1], shape)
        for map_SxS, number in zip(maps_RxSxS, numbers, strict=True)
    ]
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
        source_images=[headers[number - 1] for number in numbers],
        pixel_array=restore_planes(np.stack(placed), volume.affine),
        series_instance_uid=generate_uid(),
        series_number=_MAP_SERIES,
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
