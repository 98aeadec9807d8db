"""Measures cost against image size, batch size and number of slices, and the share of the machine's peak speed.

  python benchmarks/growth.py                        all parts
  python benchmarks/growth.py --only=roofline        one part

Each measurement runs in its own process, so that its peak memory is measured separately.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import data
from benchmarks.run import describe_machine, format_facts, jax_side, run_command
from benchmarks.workers import ROOT, measure, say
from covidjax.files import write_json

IMAGE_SIZES = (64, 128, 224, 320, 512)
BATCH_SIZES = (1, 4, 16, 64)
DATASET_SIZES = (1_000, 10_000, 100_000)
TABLE_HEADER = 'training, images/s | peak MB | inference, images/s | peak MB |'


def measure_model(options: argparse.Namespace, image_size: int, batch_size: int) -> dict[str, dict]:
    measured = {}
    for task in ('train', 'inference'):
        say(f'{task}, {image_size} pixels, batch of {batch_size}:')
        contender = jax_side(task=task, image_size=image_size, batch_size=batch_size)
        measured[task] = measure({task: contender}, options.rounds)[task]
    return measured


def format_model(label: int, measured: dict) -> str:
    cells = [f'{m.rate:.1f} | {m.peak_mb:,.0f}' for m in measured.values()]
    return f'| {label} | {" | ".join(cells)} |'


def show_image_sizes(options: argparse.Namespace) -> tuple[list[str], dict]:
    measured = {size: measure_model(options, size, options.batch_size) for size in IMAGE_SIZES}
    head = [f'| image size, pixels (batch of {options.batch_size}) | {TABLE_HEADER}', '|' + '---|' * 5]
    return head + [format_model(size, m) for size, m in measured.items()], measured


def show_batch_sizes(options: argparse.Namespace) -> tuple[list[str], dict]:
    measured = {size: measure_model(options, 224, size) for size in BATCH_SIZES}
    head = [f'| batch size (224 pixels) | {TABLE_HEADER}', '|' + '---|' * 5]
    return head + [format_model(size, m) for size, m in measured.items()], measured


def show_dataset_sizes(options: argparse.Namespace) -> tuple[list[str], dict]:
    """Measures preparing and reading against the number of slices; small slices, 96 pixels prepared as 64."""
    lines = ['| slices | preparing, images/s | peak MB | reading, images/s | peak MB |', '|' + '---|' * 5]
    results = {}
    for num_slices in DATASET_SIZES:
        say(f'{num_slices} slices:')
        folder = data.write_raw_folder(options.workdir, num_slices=num_slices, raw_size=96)
        with tempfile.TemporaryDirectory(dir=options.workdir) as prepared_dir:
            shared = {'folder': folder, 'image_size': 64}
            prepared = measure({'prepare': jax_side(task='prepare', **shared, prepared_dir=prepared_dir)}, 1, warm_up=0)
            first = Path(prepared_dir) / '0'  # output of the only round
            reading = {'load': jax_side(task='load', **shared, prepared_dir=first, batch_size=64, steps=200)}
            measured = {**prepared, **measure(reading, options.rounds)}
        lines.append(format_model(num_slices, measured))
        results[num_slices] = measured
    return lines, results


def show_roofline(options: argparse.Namespace) -> tuple[list[str], dict]:
    """Compares steps with a matrix product; they alternate, so that machine load affects both equally."""
    shared = {'image_size': 224, 'batch_size': 16}
    measured = measure(
        {
            'matrix product': jax_side(task='matrix', steps=4),
            'training step': jax_side(task='train', **shared),
            'inference': jax_side(task='inference', **shared),
        },
        options.rounds,
    )
    # `flops` counts one step or one product.
    steps = {'matrix product': 4, 'training step': 1, 'inference': 1}
    rates = {name: m.facts['flops'] * steps[name] / statistics.median(m.seconds) / 1e9 for name, m in measured.items()}
    lines = ['| 224 pixels, batch of 16, float32 | GFLOP/s | share of the matrix product |', '|---|---|---|']
    peak = rates['matrix product']
    lines += [f'| {name} | {rate:.0f} | {rate / peak:.2f} |' for name, rate in rates.items()]
    return lines, measured


PARTS = {
    'roofline': show_roofline,
    'image_size': show_image_sizes,
    'batch_size': show_batch_sizes,
    'dataset': show_dataset_sizes,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', choices=PARTS, help='run only this part')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--batch_size', type=int, default=8, help='batch size of the image_size part')
    parser.add_argument('--workdir', type=lambda text: Path(text).absolute(), default=ROOT / 'runs' / 'benchmarks')
    options = parser.parse_args()
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / 'growth.json'
    machine = describe_machine()
    results = {'machine': machine}
    for name in [options.only] if options.only else PARTS:
        lines, measured = PARTS[name](options)
        results[name] = {
            key: value._asdict() if hasattr(value, '_asdict') else {task: m._asdict() for task, m in value.items()}
            for key, value in measured.items()
        }
        write_json(path, results)
        print('\n'.join(lines), end='\n\n', flush=True)
    print(format_facts(machine))
    say(f'all rounds: {path}')


if __name__ == '__main__':
    run_command(main)
