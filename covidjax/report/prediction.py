"""prediction.html: the prediction for one scan, its top slices, how the input was read, and limits of use."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.figure import Figure

import covidjax
from covidjax.data.lists import CLASSES
from covidjax.data.preprocess import Box
from covidjax.data.scan.volume import Volume
from covidjax.evaluation.novelty import QUANTILE
from covidjax.explain import catalogue
from covidjax.explain.evidence import combine_evidence, contrast, scale_signed
from covidjax.explain.maps import Explanations, segment
from covidjax.report import page
from covidjax.report.burden import LesionPrediction, Outlined, build_burden, write_lesion_page
from covidjax.report.charts import COLOURS, FIRST, GREY, SECOND, create_picture, use_style
from covidjax.report.leading import get_shown_map
from covidjax.report.page import Table
from covidjax.report.pictures import Example, arrange_maps
from covidjax.report.reading import build_reading
from covidjax.report.sections import TARGETS, Section, describe_interval
from covidjax.report.tiles import draw_rows, draw_tiles

_NUM_MONTAGE, _COLUMNS = 16, 4


class Prediction(NamedTuple):
    """The prediction for a scan, of which the model saw T slices.

    Attributes:
      summary: the content of prediction.json.
      used: indices of these slices in the scan, from 0, int [T].
      boxes: crop boxes of all slices of the scan.
      images: the slices as the model saw them, uint8 [T, S, S].
      probabilities: of each single slice [T, K].
      attention: of the sequence model to the slices [T]; None for a slice model.
      evidence: per slice and class [T, K]: of a sequence model, the share of the slice in the logit of the scan; of a
        slice model, the evidence in the slice's own logit, summed over its pixels.
      explained: attention and evidence maps of the slices.
      combination: of the slice model, one of `att2.COMBINATIONS`.
      novelty: distance / threshold of each slice [T]; None if the run has no novelty statistics.
      outlined: outlines of lungs and lesions; None if the run has no lesion model.
    """

    summary: dict[str, Any]
    used: np.ndarray
    boxes: list[Box]
    images: np.ndarray
    probabilities: np.ndarray
    attention: np.ndarray | None
    evidence: np.ndarray
    explained: Explanations
    combination: str
    novelty: np.ndarray | None
    outlined: Outlined | None = None

    def get_top_places(self) -> np.ndarray:
        """Returns the indices in `images` of the slices that the verdict rests on."""
        return np.searchsorted(self.used, np.array(self.summary['rests_on']) - 1)


def write_page(path: Path, volume: Volume, prediction: Prediction | LesionPrediction, results: dict[str, Any]) -> None:
    """Writes prediction.html of a classifier or of a lesion model alone; see `write_prediction_page`."""
    write = write_lesion_page if isinstance(prediction, LesionPrediction) else write_prediction_page
    write(path, volume, prediction, results)


def write_prediction_page(path: Path, volume: Volume, prediction: Prediction, results: dict[str, Any]) -> None:
    """Writes a self-contained page.

    Args:
      path: where the page goes.
      volume: the scan; of its slices the middle one is enough.
      prediction: its prediction.
      results: results.json of the run.
    """
    summary = prediction.summary
    warnings = [f'Forced in spite of: {doubt}' for doubt in summary['forced']]
    warnings += [f'{warning[0].upper()}{warning[1:]}.' for warning in summary['warnings']]
    if is_unusual(summary):
        warnings.append('Do not trust the numbers below: this scan is unlike the training data.')
    page.write_page(
        path,
        'prediction.html',
        title=f'{summary["input"]["name"]}: {summary["verdict"]}',
        notice=summary['notice'] and f'the model was trained on {summary["notice"]}',
        warnings=warnings,
        headline=build_headline(summary),
        bars=[
            {'name': name, 'share': share, 'colour': COLOURS[name]} for name, share in summary['probabilities'].items()
        ],
        sections=[
            _build_verdict(summary),
            *([build_burden(prediction.outlined)] if prediction.outlined else []),
            _build_course(prediction),
            _build_top(prediction, results),
            _build_montage(prediction),
            _build_novelty(prediction),
            build_reading(volume, summary, prediction.boxes),
            _build_limits(summary, results),
        ],
    )


def is_unusual(summary: dict[str, Any]) -> bool:
    """Returns whether the median slice lies beyond the novelty threshold; False without novelty statistics."""
    return summary['novelty'] is not None and summary['novelty']['median'] > 1


def do_members_disagree(summary: dict[str, Any]) -> bool:
    """Returns whether the members of an ensemble disagree beyond the limit; False for a single model."""
    return summary['members'] is not None and summary['members']['is_beyond']


def do_windows_disagree(summary: dict[str, Any]) -> bool:
    """Returns whether another grey window changes the call; False if none was tried."""
    return summary['windows'] is not None and summary['windows']['is_changed']


def describe_windows(windows: dict[str, Any]) -> str:
    """Returns what each window calls in a sentence, e.g. 'At -1350 to 150 HU covid19 0.90; at ...'."""
    found = [
        f'at {low} to {high} HU {one["class"]} {one["probabilities"][one["class"]]:.2f}'
        for one in windows['by_window']
        for low, high in [one['window_hu']]
    ]
    text = '; '.join(found)
    return f'{text[0].upper()}{text[1:]}.'


def build_headline(summary: dict[str, Any]) -> str:
    """Returns the verdict in a sentence or two."""
    share = summary['probabilities'][summary['class']]
    conformal = summary['conformal']
    text = f'The most likely class is {summary["class"]}, with probability {share:.1%}.'
    if is_unusual(summary):
        return f'Uncertain: the scan is unlike the training data. {text}'
    if do_members_disagree(summary):
        return f'Uncertain: the members of the ensemble disagree. {text}'
    if do_windows_disagree(summary):
        return f'Uncertain: the call depends on the grey window. {text}'
    if conformal is None:
        return f'{text} The run has no calibration for scans, so there is no conformal set and no threshold.'
    held = ', '.join(conformal['set'])
    if len(conformal['set']) == 1:
        return f'{text} It is the only class in the {conformal["coverage"]:.0%} conformal set.'
    if held:
        return f'Uncertain: the {conformal["coverage"]:.0%} conformal set holds {held}. {text}'
    return f'Uncertain: no class is in the {conformal["coverage"]:.0%} conformal set. {text}'


def describe_sick(sick: dict[str, Any]) -> list[str]:
    """Returns what lesions and classifier say, and whether they disagree; `sick` is that part of prediction.json."""
    alone = ', '.join(f'{name} {p:.2f}' for name, p in sick['classifier_alone'].items())
    sentences = [
        f'The lesions decide on sick or not: probability of sick {sick["probability"]:.2f}. The classifier decides '
        f'which disease; alone it gives {alone}.'
    ]
    if sick['disagreement']:
        sentences.append(f'{sick["disagreement"][0].upper()}{sick["disagreement"][1:]}.')
    return sentences


def _build_verdict(summary: dict[str, Any]) -> Section:
    conformal, screening, vote = summary['conformal'], summary['screening'], summary['vote']
    rows = [
        (name, share, None if conformal is None else 'yes' if name in conformal['set'] else 'no')
        for name, share in summary['probabilities'].items()
    ]
    parts: list[Any] = [Table('Classes', ('class', 'probability', 'in the conformal set'), rows)]
    if 'sick' in summary:
        parts += describe_sick(summary['sick'])
    basis = 'validation' if summary['members'] is None else 'out-of-fold'
    if vote is None:
        whose = 'The temperature of the joined verdict' if 'sick' in summary else 'Its temperature'
        parts.append(f'The sequence model combines the slices. {whose} was fitted on {basis} scans.')
    elif vote['is_chosen_on_validation']:
        parts.append(
            f'Slices vote by the rule {vote["rule"]!r}, the best on {basis} scans. The temperature of the votes was '
            'fitted on the same scans.'
        )
    else:
        parts.append(
            f'Slices vote by the default rule {vote["rule"]!r}, because this run stores none. Run --mode=evaluate to '
            'choose one on validation scans and to calibrate it for scans.'
        )
    if conformal is not None:
        parts += conformal['notes']
    if summary['members'] is not None:
        parts += _describe_members(summary['members'])
    if summary['windows'] is not None:
        parts += _build_windows(summary['windows'])
    if screening is not None:
        answers = [
            (
                TARGETS[target],
                answer['score'],
                answer['threshold'],
                None if answer['is_finding'] is None else 'finding' if answer['is_finding'] else 'no finding',
            )
            for target, answer in screening.items()
        ]
        parts.append(
            Table(
                f'Screening at the thresholds chosen on {basis} scans',
                ('screened for', 'score', 'threshold', 'answer'),
                answers,
            )
        )
    return Section('verdict', 'Verdict', parts)


def _describe_members(members: dict[str, Any]) -> list[Any]:
    """Returns a table of what every member says, and a paragraph on their disagreement."""
    rows = [(f'fold {number}', *shares) for number, shares in enumerate(members['probabilities'], start=1)]
    limit = members['limit']
    beyond = 'so the verdict is uncertain' if members['is_beyond'] else 'so it does not change the verdict'
    text = (
        f'Disagreement of the members: {members["disagreement"]:.3f}, the mean over pairs of half the summed absolute '
        'differences of their probabilities. '
    )
    text += (
        'There were too few out-of-fold examples for a limit.'
        if limit is None
        else f'The limit chosen on out-of-fold examples is {limit:.3f}, {beyond}.'
    )
    return [Table('Probabilities by the members of the ensemble', ('member', *CLASSES), rows), text]


def _build_windows(windows: dict[str, Any]) -> list[Any]:
    """Returns a table of the probabilities under every window, and a paragraph."""
    rows = [
        (f'{low} to {high} HU', *one['probabilities'].values(), one['class'])
        for one in windows['by_window']
        for low, high in [one['window_hu']]
    ]
    beyond = (
        'The call depends on the window, so the verdict is uncertain'
        if windows['is_changed']
        else 'The call is the same under all'
    )
    return [
        Table(
            f'Grey windows, {windows["num_slices"]:,} slices under each; the first is that of the verdict',
            ('window', *CLASSES, 'call'),
            [*rows, ('spread', *windows['spread'].values(), '')],
        ),
        f'{beyond}. Disease does not depend on the window: a call that does is not reliable.',
    ]


def _build_course(prediction: Prediction) -> Section:
    summary = prediction.summary
    counts = summary['slices_called']
    total = sum(counts.values())
    others = total - counts[summary['class']]
    called = ', '.join(f'{count:,} {name}' for name, count in counts.items())
    text = f'Predicted classes of the slices: {called}. {others:,} of {total:,} differ from the class of the scan.'
    if counts['pneumonia'] and counts['covid19']:
        text += ' Both pneumonia and COVID-19 are predicted: check the slices.'
    if total < summary['input']['num_slices']:
        how = ', the others show few or no lungs' if prediction.attention is None else ', spread over the scan'
        text += f' The model sees {total} of {summary["input"]["num_slices"]:,} slices{how}.'
    picture = create_picture(_render_course(prediction), 'Probability of each class, slice by slice, from head to feet')
    return Section('course', 'Along the scan', [picture, text])


def _render_course(prediction: Prediction) -> Figure:
    numbers, attention = prediction.used + 1, prediction.attention
    style = {'marker': 'o', 'markersize': 3} if len(numbers) <= 40 else {}
    with use_style():
        figure = Figure(figsize=(7.5, 3 if attention is None else 5.6), layout='constrained')
        lines = figure.subplots(1 if attention is None else 3, 1, sharex=True, squeeze=False)[:, 0]
        for label, name in enumerate(CLASSES):
            lines[0].plot(numbers, prediction.probabilities[:, label], color=COLOURS[name], label=name, **style)
        for number in prediction.summary['rests_on']:
            lines[0].axvline(number, color=GREY, linewidth=0.8, linestyle=':')
        lines[0].set(ylabel='Probability of the slice', ylim=(-0.03, 1.03))
        figure.legend(*lines[0].get_legend_handles_labels(), loc='outside upper right', ncols=3)
        if attention is not None:
            lines[1].bar(numbers, attention, width=max(0.6, np.ptp(numbers) / len(numbers) / 2), color=FIRST)
            lines[1].set(ylabel='Attention to it')
            for label, name in enumerate(CLASSES):
                lines[2].plot(numbers, prediction.evidence[:, label], color=COLOURS[name], **style)
            lines[2].set(ylabel='Its evidence')
        lines[-1].set_xlabel('Slice, from head to feet (dotted: top slices)')
        return figure


def _build_top(prediction: Prediction, results: dict[str, Any]) -> Section:
    places = prediction.get_top_places()
    images, size = prediction.images[places], prediction.images.shape[1]
    explained = jax.tree.map(lambda of_slices: of_slices[places], prediction.explained)
    combination = prediction.combination
    titles = [
        f'{prediction.used[place] + 1}: {CLASSES[p.argmax()]}\n{p.max():.2f}'
        for place, p in zip(places, prediction.probabilities[places], strict=True)
    ]
    why = (
        'the highest probability of the predicted class'
        if prediction.attention is None
        else 'the highest attention of the sequence model'
    )
    of = prediction.summary['evidence']['of']
    columns = ('slice', 'predicted', *(f'evidence, {name}' for name in CLASSES))
    rows = [
        (str(prediction.used[place] + 1), CLASSES[prediction.probabilities[place].argmax()], *map(float, shares))
        for place, shares in zip(places, prediction.evidence[places], strict=True)
    ]
    parts: list[Any] = [
        f'The slices with {why}, and their evidence: exact shares in {of} less the bias, positive for a class and '
        'negative against it.',
        Table(f'Evidence in {of}', columns, rows),
    ]
    shown = get_shown_map(results)
    if shown is None or shown.startswith(catalogue.LESIONS):
        examples = [Example(title, image) for title, image in zip(titles, images, strict=True)]
        parts += [
            'No map of this run beat chance when its maps were scored, so none is shown as an explanation.'
            if shown is None
            else 'The best map of this run is that of the lesion model: see the outlines above.',
            draw_tiles(examples, len(examples), 'The top slices'),
        ]
        return Section('slices', 'Top slices', parts)
    maps = catalogue.compute_map(shown, explained, images, combination)
    of_slices = np.asarray(combine_evidence(explained.evidence, size, combination))
    called = explained.probabilities.argmax(1)
    signed = {name: scale_signed(values) for name, values in contrast(of_slices, called).items()}
    regions = segment(maps)
    leading_rows = [
        (title, [Example('slice', image), Example('map', image, m), Example('region', image, region)])
        for title, image, m, region in zip(titles, images, maps, regions, strict=True)
    ]
    parts += [
        f'The map {shown!r} of each slice as the model sees it, and the region at or above its Otsu threshold. It '
        'shows what the model weighed, not a lesion.',
        draw_rows(leading_rows, 'The top slices with the leading map', scale='scaled to 0..1'),
        'Evidence of the slices in their own logits, pixel by pixel: red is for a class (or for the first of two), '
        'blue against it.',
        draw_rows(
            arrange_maps(titles, images[..., np.newaxis], signed, is_signed=True),
            'The top slices with their evidence maps',
            scale='share in the logit, scaled to -1..1',
        ),
    ]
    return Section('slices', 'Top slices', parts)


def _build_montage(prediction: Prediction) -> Section:
    chosen = np.unique(np.linspace(0, len(prediction.used) - 1, _NUM_MONTAGE).round().astype(int))
    examples = [Example(str(prediction.used[i] + 1), prediction.images[i]) for i in chosen]
    width = 7.5 if len(examples) > 1 else 3
    picture = draw_tiles(examples, min(_COLUMNS, len(examples)), 'Montage of slices', width=width)
    return Section(
        'montage',
        'Montage',
        ['Slices as the model sees them, numbered from the head.', picture],
    )


def _build_novelty(prediction: Prediction) -> Section:
    title, found = 'Distance from the training data', prediction.summary['novelty']
    if found is None:
        return Section('novelty', title, ['Not available: this run has no novelty statistics (see the README).'])
    with use_style():
        figure = Figure(figsize=(7.5, 2.2), layout='constrained')
        axes = figure.subplots()
        axes.plot(prediction.used + 1, prediction.novelty, color=SECOND, marker='o', markersize=2.5, linewidth=1)
        axes.axhline(1, color=GREY, linestyle='--', linewidth=1)
        axes.set(xlabel='Slice, from head to feet', ylabel='Distance / threshold')
        axes.set_ylim(bottom=0)
    return Section(
        'novelty',
        title,
        [
            'Mahalanobis distance of the means and standard deviations of the features of all stages. It is divided by '
            f'a threshold that holds {QUANTILE:.0%} of held-out validation slices. Median {found["median"]:.2f}; '
            f'{found["share_unusual"]:.0%} of the slices are above 1. A small distance does not mean that the '
            'prediction is right.',
            create_picture(figure, 'Distance of each slice from the training data'),
            *_describe_home(prediction.summary['home']),
        ],
    )


def _describe_home(home: dict[str, Any] | None) -> list[Any]:
    """Returns a sentence and a table on the nearest source; nothing without sources."""
    if home is None:
        return []
    return [
        f'By the same features the scan is {home["text"]}. The likeness may be that of the scanner, the preparation or '
        'the patients; it says nothing about the class.',
        Table(
            'Median distance of the slices from the centre of each training source; 1 is usual inside a source',
            ('source', 'distance'),
            sorted(home['distances'].items(), key=lambda pair: pair[1]),
        ),
    ]


def _build_limits(summary: dict[str, Any], results: dict[str, Any]) -> Section:
    interval = describe_interval(results['intervals']['accuracy'])
    card: Sequence[tuple[str, str]] = [
        ('model', results['model']),
        ('trained on', results['data']),
        ('test accuracy', f'{results["accuracy"]:.1%} ({interval})'),
        ('code', f'covidjax {covidjax.__version__}'),
    ]
    return Section(
        'limits',
        'Limits of use',
        [
            'The model knows three classes. It assigns any other disease, such as a tumour, to one of them.',
            'Probabilities and conformal sets hold for scans like those of the validation list, at its prevalence. '
            'Another hospital, scanner or protocol may change them.',
            'Reading and cropping follow a rule that can be wrong: check the montage and the box before the numbers.',
            Table('Model', ('property', 'value'), card),
        ],
    )
