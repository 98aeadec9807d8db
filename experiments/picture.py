"""Draws the figure of the README: a phantom of each class, its lesion, and the maps of a trained slice model.

  python main.py --config=configs/att2.py --workdir=/tmp/run
  python -m experiments.picture --workdir=/tmp/run --output=docs/example.png

It takes the middle slice of the middle test patient of each class, so that no slice is picked by hand.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from covidjax.data.lesions import read_phantom_lesions
from covidjax.data.lists import CLASSES
from covidjax.errors import UserError
from covidjax.experiment import common, slices
from covidjax.experiment.config import load_config
from covidjax.explain import catalogue
from covidjax.explain.maps import explain, segment
from covidjax.report import figures, pictures
from covidjax.training.checkpoints import open_checkpoints


def draw(workdir: Path, output: Path) -> None:
    """Draws the middle slice of the middle test patient of each class."""
    config = load_config(workdir)
    data = common.load_data(config.data, workdir)
    with open_checkpoints(workdir) as checkpoints:
        variables = slices.restore_best(config, checkpoints)
    numbers = [of_class[1] for of_class in pictures.choose_examples(data.rows['test'], 3).values()]
    rows, size = [data.rows['test'][i] for i in numbers], config.data.image_size
    images = np.stack([data.sources['test'][i]['image'] for i in numbers])
    model = slices.create_model(config.model)
    explained = explain(model, variables, images)
    maps = catalogue.compute_maps(explained, size, model.combination)
    maps |= catalogue.restrict(maps, catalogue.find_lungs(images))
    leading = common.load_output(workdir, 'results.json')['explanations']['leading_map']['best']
    masks = {s.name: s.lesion for s in read_phantom_lesions(data.raw_dir, rows, size)}
    shown = {
        'lesion': np.stack([masks.get(row.file, np.zeros((size, size), bool)) for row in rows]),
        'attention 1 x 2': maps['attention 1 x 2'],
        'evidence': maps['evidence, predicted class'],
        'best map': maps[leading],
        'its region': segment(maps[leading]),
    }
    titles = [
        f'{CLASSES[row.label]}, called\n{CLASSES[p.argmax()]} {p.max():.2f}'
        for row, p in zip(rows, explained.probabilities, strict=True)
    ]
    figures.save_figure(
        pictures.render_maps(pictures.arrange_maps(titles, images, shown), scale='scaled to 0..1'), output
    )
    with Image.open(output) as image:
        small = image.convert('RGB')
    small.thumbnail((600, 600))  # size for the README
    small.save(output, optimize=True)


def main() -> None:
    """Parses the command line and draws; a user error prints one line on stderr and exits with status 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=Path, required=True, help='workdir of a finished slice run on phantoms')
    parser.add_argument('--output', type=Path, required=True, help='PNG file to write')
    options = parser.parse_args()
    try:
        draw(options.workdir, options.output)
    except UserError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main()
