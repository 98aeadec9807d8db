"""Pictures of a run, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from covidjax.files import replace_file


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all."""
    with replace_file(path) as temporary:
        figure.savefig(temporary, dpi=150, bbox_inches='tight')


def render_training_curves(history: Sequence[dict], best_epoch: int, *, title: str) -> Figure:
    """Draws loss and accuracy per epoch for training and validation, the best epoch marked.

    Args:
      history: per epoch 'epoch', 'train_loss', 'val_loss', 'train_accuracy', 'val_accuracy'.
      best_epoch: the epoch that is tested.
      title: of the figure.
    """
    figure = Figure(figsize=(9, 3.4), layout='constrained')
    figure.suptitle(title)
    epochs = [entry['epoch'] for entry in history]
    for axes, name, label in zip(
        figure.subplots(1, 2), ('loss', 'accuracy'), ('Weighted loss', 'Accuracy'), strict=True
    ):
        for split, colour in (('train', '#767676'), ('val', '#0b62a4')):
            values = [entry[f'{split}_{name}'] for entry in history]
            axes.plot(
                epochs, values, marker='o', markersize=3, color=colour, label={'val': 'validation'}.get(split, split)
            )
        axes.axvline(best_epoch, color='#c23b22', linewidth=1, linestyle='--', label=f'best epoch ({best_epoch})')
        axes.set_xlabel('Epoch')
        axes.set_ylabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    return figure


def render_confusion_matrix(confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str) -> Figure:
    """Draws counts and, as colour and percentage, rates within each true class (rows)."""
    counts = np.asarray(confusion)
    rates = counts / np.maximum(counts.sum(1, keepdims=True), 1)
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
    figure.colorbar(image, label='Share of the true class', shrink=0.8)
    return figure
