"""The DICOM report of a scan: a Comprehensive SR by TID 1500. Needs highdicom, an optional package."""

from collections.abc import Sequence
from typing import Any

from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from covidjax.predict.dicom_codes import EVALUATIONS, MILLILITRE, create_code
from covidjax.report.burden import LesionPrediction, describe_burden
from covidjax.report.lesions import LOOKALIKES
from covidjax.report.prediction import Prediction, build_headline, describe_windows

MAKER = 'covidjax'
USE = 'Research use only. Not a medical device; do not use it in the care of patients.'
SEGMENTS = ('lungs', 'lesion', 'consolidation')  # by number, from 1
_SERIES = 9001  # series number


def create_report(
    headers: Sequence[Dataset],
    prediction: Prediction | LesionPrediction,
    segments: Dataset | None,
    maker: dict[str, str],
) -> Dataset:
    """Returns the report of a prediction: groups of measurements, the verdict as a code, and doubts as text.

    Args:
      headers: of the T slices of the scan, from head to feet.
      prediction: of the scan.
      segments: the outlines, if there are such; the report refers to them.
      maker: see `dicom_results.describe_maker`.
    """
    summary = prediction.summary
    groups = _create_class_groups(headers, summary, maker) if 'verdict' in summary else []
    if 'lesions' in summary:
        groups += _create_lesion_groups(headers, summary['lesions'], segments, maker)
    evidence = [*headers, *([] if segments is None else [segments])]
    return _create_document(evidence, groups, summary.get('verdict', 'undetermined'), list_sentences(summary), maker)


def create_refusal_report(headers: Sequence[Dataset], reason: str, maker: dict[str, str]) -> Dataset:
    """Returns the report of a scan that was refused; `reason` is a sentence."""
    return _create_document(headers, [], 'undetermined', [USE, 'Not predicted: the scan was refused.', reason], maker)


def list_sentences(summary: dict[str, Any]) -> list[str]:
    """Returns what a reader of the report must know, most important first.

    Args:
      summary: content of prediction.json.
    """
    sentences = [USE]
    if summary['notice']:
        sentences.append(f'The model was trained on {summary["notice"]}: its results say nothing about a patient.')
    sentences += [f'Predicted in spite of: {doubt}{"" if doubt.endswith("?") else "."}' for doubt in summary['forced']]
    if 'verdict' in summary:
        sentences += _list_doubts(summary)
    sentences += [f'{warning[0].upper()}{warning[1:]}.' for warning in summary['warnings']]
    if 'lesions' in summary:
        lesions = summary['lesions']
        infected = f' Infected slices: {format_runs(lesions["infected"])}.' if lesions['infected'] else ''
        sentences.append(f'{describe_burden(lesions)}.{infected}')
        sentences += [f'{remark[0].upper()}{remark[1:]}.' for remark in lesions['remarks']]
        sentences.append(LOOKALIKES)
    if 'rests_on' in summary:
        sentences.append(f'The verdict rests on slices {", ".join(map(str, summary["rests_on"]))}.')
    sentences.append(f'Slices are numbered from head to feet, 1 to {summary["input"]["num_slices"]}.')
    return sentences


def _list_doubts(summary: dict[str, Any]) -> list[str]:
    sentences = [build_headline(summary)]
    conformal, members, novelty = summary['conformal'], summary['members'], summary['novelty']
    if conformal is not None:
        sentences += conformal['notes']
    if members is not None:
        sentences.append(f'The members of the ensemble disagree by {members["disagreement"]:.3f}.')
    if summary['windows'] is not None:
        sentences.append(f'Under several grey windows: {describe_windows(summary["windows"])}')
    if novelty is not None:
        sentences.append(
            f'The median slice is at {novelty["median"]:.2f} of the threshold of what is unlike the training data; '
            f'{novelty["share_unusual"]:.0%} of the slices are beyond it.'
        )
    disagreement = summary.get('sick', {}).get('disagreement')
    if disagreement:
        sentences.append(f'{disagreement[0].upper()}{disagreement[1:]}.')
    return sentences


def format_runs(numbers: Sequence[int]) -> str:
    """Returns ascending numbers in runs, e.g. '3, 5-8'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ', '.join(str(first) if first == last else f'{first}-{last}' for first, last in runs)


def _create_class_groups(headers: Sequence[Dataset], summary: dict[str, Any], maker: dict[str, str]) -> list[Any]:
    """Returns a group (TID 1501) for each class: its probability, and the slices that the verdict rests on."""
    from highdicom import sr

    parameters = [f'run {maker["device_serial_number"]}', f'trained on {summary["trained_on"]}']
    algorithm = _identify(maker['manufacturer_model_name'], parameters, maker)
    rests_on = [headers[number - 1] for number in summary['rests_on']]
    return [
        sr.MeasurementsAndQualitativeEvaluations(
            tracking_identifier=sr.TrackingIdentifier(identifier=f'Probability of {name}'),
            finding_type=create_code(name),
            algorithm_id=algorithm,
            finding_sites=[sr.FindingSite(create_code('lungs'))],
            measurements=[sr.Measurement(codes.DCM.Probability, round(100 * share, 2), codes.UCUM.Percent)],
            source_images=[sr.SourceImageForMeasurementGroup.from_source_image(header) for header in rests_on],
        )
        for name, share in summary['probabilities'].items()
    ]


def _create_lesion_groups(
    headers: Sequence[Dataset], lesions: dict[str, Any], segments: Dataset | None, maker: dict[str, str]
) -> list[Any]:
    """Returns a group (TID 1411) of the volumes of each segment, and one (TID 1501) of the infected slices."""
    from highdicom import sr

    parameters = [f'weights {lesions["digest"][:12]}', f'threshold {lesions["threshold"]:g}']
    algorithm = _identify(lesions['model'], parameters, maker)
    common = {'algorithm_id': algorithm, 'finding_sites': [sr.FindingSite(create_code('lungs'))]}
    volume, share = codes.SCT.Volume, codes.DCM.VolumeRatio
    density = codes.DCM.AttenuationCoefficient
    measurements = {
        'lungs': [(volume, lesions['lungs_ml'], MILLILITRE, None)],
        'lesion': [
            (volume, lesions['lesions_ml'], MILLILITRE, None),
            (share, lesions['lesions_percent'], codes.UCUM.Percent, None),
            (density, lesions['lesions_hu'], codes.UCUM.HounsfieldUnit, codes.SCT.Mean),
        ],
        'consolidation': [
            (volume, lesions['consolidation_ml'], MILLILITRE, None),
            (share, lesions['consolidation_percent'], codes.UCUM.Percent, None),
        ],
    }
    groups = []
    for number, name in enumerate(SEGMENTS if segments is not None else (), 1):
        segment = sr.ReferencedSegment(
            segments.SOPClassUID,
            segments.SOPInstanceUID,
            number,
            source_series=sr.SourceSeriesForSegmentation.from_source_image(headers[0]),
        )
        groups.append(
            sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(
                    uid=segments.SegmentSequence[number - 1].TrackingUID, identifier=name
                ),
                referenced_segment=segment,
                finding_type=create_code(name),
                measurements=[
                    sr.Measurement(what, round(value, 2), unit, derivation=derivation)
                    for what, value, unit, derivation in measurements[name]
                    if value is not None
                ],
                **common,
            )
        )
    if lesions['infected']:
        infected = [headers[number - 1] for number in lesions['infected']]
        groups.append(
            sr.MeasurementsAndQualitativeEvaluations(
                tracking_identifier=sr.TrackingIdentifier(identifier='Infected slices'),
                finding_type=create_code('lesion'),
                qualitative_evaluations=[sr.QualitativeEvaluation(create_code('presence'), create_code('present'))],
                source_images=[sr.SourceImageForMeasurementGroup.from_source_image(header) for header in infected],
                **common,
            )
        )
    return groups


def _identify(model: str, parameters: list[str], maker: dict[str, str]) -> Any:
    from highdicom import sr

    return sr.AlgorithmIdentification(
        name=f'{MAKER} {model}', version=maker['software_versions'], parameters=parameters, manufacturer=MAKER
    )


def _create_document(
    evidence: Sequence[Dataset], groups: list[Any], verdict: str, sentences: Sequence[str], maker: dict[str, str]
) -> Dataset:
    from highdicom import sr

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
    # highdicom asks for measurements, which TID 1500 does not if there are evaluations.
    filler = sr.MeasurementsAndQualitativeEvaluations(sr.TrackingIdentifier(identifier='none'))
    [content] = sr.MeasurementReport(context, create_code('chest CT'), groups or [filler])
    if not groups:
        del content.ContentSequence[-1]
    content.ContentSequence.append(_create_evaluations(verdict, sentences))
    return sr.ComprehensiveSR(
        evidence=evidence,
        content=content,
        series_instance_uid=generate_uid(),
        series_number=_SERIES,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        is_complete=True,
        series_description=f'{MAKER}: report (research use only)',
        **maker,
    )


def _create_evaluations(verdict: str, sentences: Sequence[str]) -> Dataset:
    """Returns rows 12 to 14 of TID 1500: the verdict as a code, and sentences as text."""
    from highdicom import sr

    contains = sr.RelationshipTypeValues.CONTAINS
    container = sr.ContainerContentItem(name=EVALUATIONS, relationship_type=contains)
    container.ContentSequence = sr.ContentSequence(
        [sr.CodeContentItem(codes.DCM.Finding, create_code(verdict), contains)]
        + [sr.TextContentItem(codes.DCM.Comment, text, contains) for text in sentences]
    )
    return container
