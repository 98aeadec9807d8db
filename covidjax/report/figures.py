"""Plots of training, scores and curves in the style of `report.charts`. They need no display."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from covidjax.files import replace_file
from covidjax.report.charts import COLOURS, FIRST, GREY, SECOND, use_style


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG on a white background, atomically."""
    with use_style(), replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches='tight', facecolor='white')


def render_training_curves(history: Sequence[dict], best_epoch: int, score: str = 'accuracy') -> Figure:
    """Draws training and validation loss and score per epoch, and marks the best epoch.

    Args:
      history: per epoch: 'epoch', 'train_loss', 'val_loss', 'train_<score>', 'val_<score>'.
      best_epoch: the epoch whose parameters are tested.
      score: name of the score.
    """
    with use_style():
        figure = Figure(figsize=(7.5, 3), layout='constrained')
        epochs = [entry['epoch'] for entry in history]
        for axes, name, label in zip(
            figure.subplots(1, 2), ('loss', score), ('Weighted loss', score.capitalize()), strict=True
        ):
            for split, colour in (('train', GREY), ('val', FIRST)):
                values = [entry[f'{split}_{name}'] for entry in history]
                shown = {'val': 'validation', 'train': 'training'}[split]
                axes.plot(epochs, values, marker='o', markersize=3, color=colour, label=shown)
            axes.axvline(best_epoch, color=SECOND, linewidth=1, linestyle='--', label=f'best epoch ({best_epoch})')
            axes.set_xlabel('Epoch')
            axes.set_ylabel(label)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.legend()
        return figure


def render_confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str) -> Figure:
    """Draws the counts; colour and percentage show the rate within each true class (row)."""
    counts = np.asarray(confusion)
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    with use_style():
        figure = Figure(figsize=(4.6, 4), layout='constrained')
        axes = figure.subplots()
        image = axes.imshow(rates, cmap='Blues', vmin=0, vmax=1)
        for i, j in np.ndindex(counts.shape):
            colour = 'white' if rates[i, j] > 0.5 else 'black'
            axes.text(j, i, f'{counts[i, j]:,}\n{rates[i, j]:.1%}', ha='center', va='center', color=colour)
        axes.set_xticks(range(len(classes)), classes)
        axes.set_yticks(range(len(classes)), classes)
        axes.set_xlabel('Predicted')
        axes.set_ylabel('True')
        axes.set_title(title)
        axes.grid(visible=False)
        figure.colorbar(image, label='Share of the true class', shrink=0.8)
        return figure


def render_accuracies(scores: Mapping[str, dict]) -> Figure:
    """Draws the accuracy of each classifier with its interval; `scores` maps names to `compute_metrics`."""
    with use_style():
        figure = Figure(figsize=(6, 0.8 + 0.4 * len(scores)), layout='constrained')
        axes = figure.subplots()
        for place, metrics in enumerate(scores.values()):
            colour = FIRST if place == 0 else GREY
            if metrics['intervals']['accuracy']:  # None for a single patient
                axes.plot(metrics['intervals']['accuracy'], [place, place], color=colour, linewidth=2)
            axes.plot(metrics['accuracy'], place, 'o', color=colour)
            axes.text(1.02, place, f'{metrics["accuracy"]:.3f}', va='center')
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlim(0, 1.15)
        axes.set_xticks(np.linspace(0, 1, 6))
        axes.set_xlabel('Accuracy')
        axes.grid(visible=False, axis='y')
        return figure


def render_sides(scores: Mapping[str, tuple[dict, dict]]) -> Figure:
    """Draws scores between 0 and 1 inside and outside, each {value, interval}, with their intervals."""
    with use_style():
        figure = Figure(figsize=(7.5, 0.9 + 0.36 * len(scores)), layout='constrained')
        axes = figure.subplots()
        for side, (name, colour, shift) in enumerate((('inside', GREY, -0.14), ('outside', FIRST, 0.14))):
            for place, sides in enumerate(scores.values()):
                if sides[side]['interval']:
                    axes.plot(sides[side]['interval'], [place + shift] * 2, color=colour, linewidth=2)
            values = [sides[side]['value'] for sides in scores.values()]
            axes.plot(values, [place + shift for place in range(len(values))], 'o', color=colour, label=name)
        axes.set_yticks(range(len(scores)), list(scores))
        axes.set_ylim(len(scores) - 0.5, -0.5)
        axes.set_xlim(-0.02, 1.02)
        axes.grid(visible=False, axis='y')
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2)
        return figure


def render_curves(per_class: Mapping[str, dict]) -> Figure:
    """Draws one-vs-rest ROC and precision-recall curves; `per_class` is from `compute_curves`."""
    with use_style():
        figure = Figure(figsize=(7.5, 3.6), layout='constrained')
        roc, precision_recall = figure.subplots(1, 2)
        roc.plot([0, 1], [0, 1], color=GREY, linestyle='--', linewidth=1, label='chance')
        for name, curves in per_class.items():
            if curves['auc'] is None:
                continue
            label = f'{name} ({curves["auc"]:.3f})'
            roc.plot(curves['roc']['fpr'], curves['roc']['tpr'], color=COLOURS[name], label=label)
            label = f'{name} ({curves["average_precision"]:.3f})'
            of_class = curves['precision_recall']
            precision_recall.plot(of_class['recall'], of_class['precision'], color=COLOURS[name], label=label)
        for axes, x, y, title in (
            (roc, '1 - specificity', 'Sensitivity', 'ROC (area under the curve)'),
            (precision_recall, 'Recall', 'Precision', 'Precision-recall (average precision)'),
        ):
            axes.set(xlabel=x, ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), title=title)
            axes.legend(loc='lower center' if axes is precision_recall else 'lower right')
        return figure


def render_decision_curves(curves: Mapping[str, dict]) -> Figure:
    """Draws the net benefit of the model, of calling everyone positive and of calling no one positive, per target."""
    with use_style():
        figure = Figure(figsize=(7.5, 3.2), layout='constrained')
        for axes, (target, curve) in zip(
            figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True
        ):
            axes.plot(curve['threshold'], curve['model'], color=FIRST, label='model')
            axes.plot(curve['threshold'], curve['all'], color=SECOND, linestyle='--', label='call all positive')
            axes.plot(curve['threshold'], curve['none'], color=GREY, linestyle=':', label='call none positive')
            highest = max(curve['all'][0], *curve['model'], 0.01)
            axes.set(xlabel='Threshold probability', title=target, ylim=(-0.1 * highest, 1.1 * highest))
            axes.legend()
        figure.axes[0].set_ylabel('Net benefit')
        return figure


def render_reliability(before: dict, after: dict) -> Figure:
    """Draws accuracy against confidence before and after temperature scaling; marker areas show the counts."""
    with use_style():
        figure = Figure(figsize=(4.4, 3.8), layout='constrained')
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linestyle='--', linewidth=1, label='perfect')
        for name, calibration, colour in (('before', before, GREY), ('after', after, FIRST)):
            bins = [entry for entry in calibration['bins'] if entry['count']]
            confidences, accuracies = ([entry[key] for entry in bins] for key in ('confidence', 'accuracy'))
            total = sum(entry['count'] for entry in bins)
            axes.plot(confidences, accuracies, color=colour, label=f'{name} (ECE {calibration["ece"]:.3f})')
            axes.scatter(confidences, accuracies, [8 + 300 * e['count'] / total for e in bins], colour, alpha=0.5)
        axes.set(xlabel='Confidence', ylabel='Accuracy', xlim=(0, 1.02), ylim=(0, 1.02))
        axes.legend(loc='upper left')
        return figure


def render_volume_errors(scores: Mapping[str, Any]) -> Figure:
    """Draws Bland-Altman plots of lesion volumes, in ml and as a share of the lungs, with mean and limits of agreement.

    Args:
      scores: of `segmentation.score_slices`; at least one volume has a spacing or outlined lungs.
    """
    units = {'ml': 'ml', 'percent': '% of the lungs'}
    shown = [unit for unit in units if scores[f'volume_error_{unit}']['n']]
    with use_style():
        figure = Figure(figsize=(3.75 * len(shown), 3.4), layout='constrained')
        for axes, unit in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            error = scores[f'volume_error_{unit}']
            pairs = np.array(
                [
                    (volume[f'outlined_{unit}'], volume[f'predicted_{unit}'])
                    for volume in scores['volumes']
                    if volume[f'outlined_{unit}'] is not None
                ]
            )
            axes.scatter(pairs.mean(1), pairs[:, 1] - pairs[:, 0], 18, FIRST)
            axes.axhline(error['mean'], color=SECOND, label=f'mean {error["mean"]:+.3g}')
            for limit, label in zip(error['limits'] or (), ('limits of agreement', None), strict=False):
                axes.axhline(limit, color=SECOND, linestyle='--', linewidth=1, label=label)
            axes.axhline(0, color=GREY, linewidth=1)
            axes.set(xlabel=f'Mean of outlined and predicted, {units[unit]}', title=f'Lesions, {units[unit]}')
            axes.legend(loc='upper center', bbox_to_anchor=(0.5, -0.2), ncols=2)
        figure.axes[0].set_ylabel('Predicted less outlined')
        return figure


def render_risk_coverage(curve: dict[str, Any]) -> Figure:
    """Draws the error rate against coverage, the share of examples that is answered."""
    with use_style():
        figure = Figure(figsize=(4.4, 3.2), layout='constrained')
        axes = figure.subplots()
        axes.plot(curve['coverage'], curve['risk'], color=FIRST)
        axes.set(xlabel='Coverage (most confident first)', ylabel='Error rate', xlim=(0, 1))
        axes.set_ylim(bottom=0)
        return figure


def render_erasure_curves(curves: Mapping[str, dict[str, Sequence[float]]]) -> Figure:
    """Draws mean deletion and insertion curves of several maps. Both start with the highest pixels of a map.

    Args:
      curves: map name -> 'deletion' and 'insertion', the probability at evenly spaced shares of the pixels.
    """
    with use_style():
        figure = Figure(figsize=(7.5, 3.2), layout='constrained')
        colours = (FIRST, SECOND, *COLOURS.values(), GREY)
        for axes, name in zip(figure.subplots(1, 2), ('deletion', 'insertion'), strict=True):
            for (label, curve), colour in zip(curves.items(), colours, strict=False):
                axes.plot(np.linspace(0, 1, len(curve[name])), curve[name], color=colour, label=label)
            verb = 'blurred' if name == 'deletion' else 'restored'
            axes.set(xlabel=f'Share of pixels {verb}', title=name.capitalize())
        figure.axes[0].set_ylabel('Probability of the predicted class')
        figure.axes[1].legend(loc='center left', bbox_to_anchor=(1, 0.5))
        return figure
