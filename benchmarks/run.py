r"""Benchmarks this project against the same pipeline in PyTorch and prints a table of speed ratios.

  python benchmarks/run.py --torch_python=/path/to/torch-venv/bin/python     every row
  python benchmarks/run.py --only=train,inference --rounds=9                 two rows, without PyTorch

The two sides are separate processes that alternate round by round, so that other load on the machine affects both
equally. Ratios are ratios of medians; the range in brackets is over single rounds.
"""

import argparse
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.workers import ROOT, Contender, Measurement, Worker, measure, say
from covidjax.errors import UserError
from covidjax.files import write_json

# Environment variables that make any program keep freed memory, as `training.runtime.keep_freed_memory` does here.
KEEP_MEMORY = {'MALLOC_ARENA_MAX': '1', 'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**40)}
CPU_FLAGS = ('avx2', 'avx512f', 'avx512_bf16', 'avx512_vnni', 'amx_tile', 'amx_bf16')


class Comparison(NamedTuple):
    """A line of the table.

    Attributes:
      what: the work that is compared.
      ours, theirs: names of measurements.
      must, aim: required and desired speed ratio, ours over theirs; None if there is no goal.
      unit: 'images/s', or 's' for the time of a whole round.
    """

    what: str
    ours: str
    theirs: str
    must: float | None = None
    aim: float | None = None
    unit: str = 'images/s'


Measurements = dict[str, Measurement]
Row = list[tuple[Comparison, Measurements]]


def jax_side(**options: object) -> Contender:
    return Contender(sys.executable, 'benchmarks.jax_worker', options)


def torch_sides(options: argparse.Namespace, contenders: dict[str, dict], **shared: object) -> dict[str, Contender]:
    """Returns the PyTorch contenders, none without --torch_python; names ending in 'kept memory' get KEEP_MEMORY."""
    if options.torch_python is None:
        return {}
    return {
        name: Contender(
            options.torch_python,
            'benchmarks.torch_worker',
            {**shared, **own},
            KEEP_MEMORY if name.endswith('kept memory') else {},
        )
        for name, own in contenders.items()
    }


FLOAT32 = {
    'eager': {},
    'channels_last': {'channels_last': True},
    'channels_last, kept memory': {'channels_last': True},
}
BFLOAT16 = {'channels_last': True, 'dtype': 'bfloat16'}


def measure_pairs(comparisons: list[Comparison], contenders: dict[str, Contender], rounds: int) -> Row:
    """Measures the comparisons one after the other: all contenders together do not fit into memory."""
    row, seen = [], set()
    for comparison in comparisons:
        pair = {name: contenders[name] for name in (comparison.ours, comparison.theirs) if name in contenders}
        if tuple(pair) not in seen:
            seen.add(tuple(pair))
            row.append((comparison, measure(pair, rounds)))
    return row


def compare_steps(
    options: argparse.Namespace,
    what: str,
    shared: dict[str, object],
    bfloat16: tuple[str, ...],
    goals: dict[str, tuple[float | None, float | None]],
) -> Row:
    """Measures steps on data in memory against every PyTorch variant.

    Args:
      options: command-line options.
      what: the work that is compared.
      shared: options of both workers.
      bfloat16: names of the PyTorch contenders in bfloat16.
      goals: ('must', 'aim') by PyTorch contender.
    """
    shared = {**shared, 'image_size': options.image_size, 'batch_size': options.batch_size}
    contenders = {
        'covidjax': jax_side(**shared),
        'covidjax bfloat16': jax_side(**shared, dtype='bfloat16'),
        **torch_sides(options, {**FLOAT32, **dict.fromkeys(bfloat16, BFLOAT16)}, **shared),
    }
    pairs = [('covidjax', name) for name in FLOAT32] + [('covidjax bfloat16', name) for name in bfloat16]
    what = f'{what}, batch {options.batch_size}'
    comparisons = [Comparison(what, ours, theirs, *goals.get(theirs, ())) for ours, theirs in pairs]
    return measure_pairs(comparisons, contenders, options.rounds)


def run_training(options: argparse.Namespace) -> Row:
    goals = {
        'eager': (1.2, 2),
        'channels_last': (0.9, 1.3),
        'channels_last, kept memory': (1, 1.1),
        'bfloat16 autocast, kept memory': (0.9, 1),
    }
    narrow = ('bfloat16 autocast', 'bfloat16 autocast, kept memory')
    return compare_steps(options, 'training step', {'task': 'train', 'steps': 1}, narrow, goals)


def run_inference(options: argparse.Namespace) -> Row:
    goals = {'eager': (1.3, 2.5), 'bfloat16': (None, 1)}
    narrow = ('bfloat16', 'bfloat16, kept memory')
    return compare_steps(options, 'inference', {'task': 'inference', 'steps': 2}, narrow, goals)


LIGHT = {'model': 'efficientnet_lite0'}
PEERS = ('torch', 'torchvision', 'onnxruntime', 'openvino')  # whose versions are printed
ENGINES = ('onnxruntime', 'openvino', 'torch.compile')


def compare_engines(
    options: argparse.Namespace, what: str, model: dict[str, str], steps: int, kinds: dict[str, bool]
) -> Row:
    """Measures inference against engines that fold batch normalisation.

    Args:
      options: command-line options.
      what: the work that is compared.
      model: option of both workers.
      steps: batches per round.
      kinds: end of a contender's name -> whether the engine gets the model without its dead work.
    """
    shared = {**model, 'task': 'inference', 'image_size': options.image_size, 'batch_size': options.batch_size}
    contenders = {
        'covidjax': jax_side(**shared, steps=steps),
        'covidjax bfloat16': jax_side(**shared, steps=steps, dtype='bfloat16'),
    }
    comparisons = []
    for dtype, engine in itertools.product(('float32', 'bfloat16'), ENGINES):
        if dtype == 'bfloat16' and engine == 'onnxruntime':
            continue  # its CPU provider has no bfloat16 convolution
        ours = 'covidjax' if dtype == 'float32' else 'covidjax bfloat16'
        for suffix, no_dead_work in kinds.items():
            if engine == 'torch.compile' and not no_dead_work:
                continue
            name = engine + (' bfloat16' if dtype == 'bfloat16' else '') + suffix
            must, aim = {'float32': (1, 1.15), 'bfloat16': (0.8, 1)}[dtype]
            goals = (must, aim) if no_dead_work and engine != 'torch.compile' else ()
            comparisons.append(Comparison(f'{what}, batch {options.batch_size}', ours, name, *goals))
            if options.torch_python is not None:
                given = {**shared, 'steps': steps, 'engine': engine, 'dtype': dtype, 'no_dead_work': no_dead_work}
                contenders[name] = Contender(options.torch_python, 'benchmarks.peer_worker', given)
    return measure_pairs(comparisons, contenders, options.rounds)


def run_engines(options: argparse.Namespace) -> Row:
    kinds = {'': True, ', with dead work': False}
    return compare_engines(options, 'inference', {}, 2, kinds)


def run_light_engines(options: argparse.Namespace) -> Row:
    return compare_engines(options, 'inference, light', LIGHT, 4, {'': True})


def run_light_training(options: argparse.Namespace) -> Row:
    goals = {'channels_last': (1, 1.2)}
    return compare_steps(options, 'training step, light', {**LIGHT, 'task': 'train', 'steps': 2}, (), goals)


def run_light_inference(options: argparse.Namespace) -> Row:
    goals = {'channels_last': (1.3, 1.5)}
    return compare_steps(options, 'inference, light', {**LIGHT, 'task': 'inference', 'steps': 4}, (), goals)


def run_lesion_training(options: argparse.Namespace) -> Row:
    shared = {'model': 'lesions', 'task': 'train', 'steps': 2}
    return compare_steps(options, 'training step, lesions', shared, (), {'channels_last': (1, None)})


def run_lesion_pass(options: argparse.Namespace) -> Row:
    """Measures the outlines of a scan of about 150 slices; the model of this package takes slices of 224 pixels."""
    steps = -(-150 // options.batch_size)
    shared = {'model': 'lesions', 'task': 'outline', 'steps': steps, 'batch_size': options.batch_size}
    contenders = {'covidjax': jax_side(**shared), **torch_sides(options, FLOAT32, **shared)}
    what = f'outlines of {steps * options.batch_size} slices, with mirror images'
    comparisons = [Comparison(what, 'covidjax', name, unit='s') for name in FLOAT32]
    return measure_pairs(comparisons, contenders, options.rounds)


def run_augmentation(options: argparse.Namespace) -> Row:
    shared = {'task': 'augment', 'image_size': options.image_size, 'batch_size': 4 * options.batch_size, 'steps': 8}
    measurements = measure(
        {'covidjax': jax_side(**shared), **torch_sides(options, {'transforms, 2 workers': {}}, **shared)},
        options.rounds,
    )
    what = f'augmentation, batch {shared["batch_size"]}'
    return [(Comparison(what, 'covidjax', 'transforms, 2 workers', 3, 10), measurements)]


def run_preparation(options: argparse.Namespace) -> Row:
    from benchmarks import data

    folder = data.write_raw_folder(options.workdir, num_slices=options.num_slices, raw_size=512)
    with tempfile.TemporaryDirectory(dir=options.workdir) as prepared_dir:
        shared = {'image_size': options.image_size, 'folder': folder, 'prepared_dir': prepared_dir}
        measurements = measure(
            {
                'covidjax': jax_side(task='prepare', **shared),
                'Pillow loop, 1 process': jax_side(task='pillow', **shared),
            },
            options.rounds,
            warm_up=0,  # nothing to compile
        )
    return [(Comparison('preparation', 'covidjax', 'Pillow loop, 1 process', 1.8, 1.95), measurements)]


def run_epoch(options: argparse.Namespace) -> Row:
    from benchmarks import data
    from covidjax.data import covidx_ct

    folder = data.write_raw_folder(options.workdir, num_slices=1000, raw_size=512)
    prepared_dir = options.workdir / 'prepared'
    prepared = covidx_ct.prepare(str(folder), image_size=options.image_size, prepared_dir=str(prepared_dir))
    pngs = data.write_png_folder(options.workdir, prepared, options.image_size)
    shared = {'task': 'epoch', 'image_size': options.image_size, 'batch_size': options.batch_size, 'steps': 8}
    kinds = {'eager': {}, 'channels_last': {'channels_last': True}}
    measurements = measure(
        {
            'covidjax': jax_side(**shared, folder=folder, prepared_dir=prepared_dir),
            **torch_sides(options, kinds, **shared, folder=pngs),
        },
        max(options.rounds // 2, 1),
    )
    what = f'epoch of {shared["steps"]} steps with loading, batch {options.batch_size}'
    comparisons = [Comparison(what, 'covidjax', 'eager', 1.2, 2), Comparison(what, 'covidjax', 'channels_last')]
    return [(comparison, measurements) for comparison in comparisons]


def run_compilation(options: argparse.Namespace) -> Row:
    contender = jax_side(task='compile', image_size=options.image_size, batch_size=options.batch_size)
    seconds = {'warm cache': [], 'cold cache': []}
    for i in range(options.rounds):
        with tempfile.TemporaryDirectory() as cache:
            for name in ('cold cache', 'warm cache'):
                with Worker(contender._replace(environment={'JAX_COMPILATION_CACHE_DIR': cache})) as worker:
                    facts = worker.read()['facts']
                seconds[name].append((facts['tracing'], facts['compiling']))
                say(f'  round {i + 1}: {name}: tracing {facts["tracing"]:.2f} s, compiling {facts["compiling"]:.2f} s')

    def summarise(choose: Callable[[tuple[float, float]], float]) -> Measurements:
        return {name: Measurement([choose(s) for s in values], 1, [], 0.0, {}) for name, values in seconds.items()}

    what = 'compiling a training step'
    return [
        (Comparison(f'{what}, with tracing', 'warm cache', 'cold cache', 3, 6, 's'), summarise(sum)),
        (Comparison(f'{what}, without', 'warm cache', 'cold cache', unit='s'), summarise(lambda s: s[1])),
    ]


def run_sequences(options: argparse.Namespace) -> Row:
    """Trains the demo's scan model from the command line, with and without cached draws, on the same extractor.

    The image size is that of the other rows; the network is the demo's, with width 8.
    """
    seconds = {}
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        data = [
            f'--config.data.prepared_dir={options.workdir / "prepared"}',
            f'--config.data.image_size={options.image_size}',
        ]
        extractor = Path(folder) / 'extractor'
        few = ['--config.train.num_epochs=1', '--config.train.steps_per_epoch=10', '--config.train.warmup_steps=0']
        run_main('--config=configs/att2.py', *data, f'--workdir={extractor}', *few)
        for name, draws in (('no cached draws', 0), ('4 cached draws', 4)):
            workdir = Path(folder) / str(draws)
            chosen = [
                f'--config.extractor={extractor}',
                f'--config.data.cached_draws={draws}',
                '--config.train.num_epochs=5',
            ]
            run_main('--config=configs/seq.py', *data, f'--workdir={workdir}', *chosen)
            epochs = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
            seconds[name] = [epoch['seconds'] for epoch in epochs[1:]]
            say(f'  {name}: {statistics.median(seconds[name]):.2f} s per epoch after the first')
    measurements = {name: Measurement(values, 1, [], 0.0, {}) for name, values in seconds.items()}
    what = 'epoch of sequence training after the first, demo network'
    return [(Comparison(what, '4 cached draws', 'no cached draws', 10, 50, 's'), measurements)]


def run_main(*flags: str) -> None:
    """Runs `main.py`; its output is shown only if it fails."""
    done = subprocess.run([sys.executable, 'main.py', *flags], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f'`main.py {" ".join(flags)}` failed with status {done.returncode}: {done.stderr[-2000:]}')


ROWS: dict[str, Callable[[argparse.Namespace], Row]] = {
    'train': run_training,
    'inference': run_inference,
    'light_train': run_light_training,
    'light_inference': run_light_inference,
    'lesion_train': run_lesion_training,
    'lesion_pass': run_lesion_pass,
    'engines': run_engines,
    'light_engines': run_light_engines,
    'augment': run_augmentation,
    'prepare': run_preparation,
    'epoch': run_epoch,
    'sequences': run_sequences,
    'compile': run_compilation,
}


def describe_machine() -> dict[str, object]:
    """Returns the versions of this project's dependencies, the CPU model, usable cores and CPU flags."""
    cpu = Path('/proc/cpuinfo').read_text()
    flags = re.search(r'^flags\s*: (.*)$', cpu, re.MULTILINE)
    model = re.search(r'^model name\s*: (.*)$', cpu, re.MULTILINE)
    return {
        'cpu': model[1] if model else platform.machine(),
        'cores': len(os.sched_getaffinity(0)),
        'cpu_flags': [flag for flag in CPU_FLAGS if flags and flag in flags[1].split()],
        'python': platform.python_version(),
        **{name: metadata.version(name) for name in ('jax', 'jaxlib', 'flax', 'numpy', 'pillow')},
    }


def format_facts(machine: dict[str, object]) -> str:
    """Formats the facts of the machine on one line."""
    return ', '.join(f'{key} {" ".join(v) if isinstance(v, list) else v}' for key, v in machine.items())


def format_line(comparison: Comparison, measurements: Measurements) -> str:
    """Formats a line of the table; without the other side it shows only our result."""
    what, ours, theirs, must, aim, unit = comparison

    def show(name: str) -> str:
        m = measurements[name]
        return f'{m.rate:.1f} images/s' if unit == 'images/s' else f'{statistics.median(m.seconds):.2f} s'

    if theirs not in measurements:
        return f'| {what} | {ours} | {show(ours)} | | | | | |'
    ratio, low, high = compute_ratio(measurements[ours], measurements[theirs])
    speed = f'**{ratio:.2f}** ({low:.2f} to {high:.2f})'
    goals = ['' if goal is None else f'{goal:g}' for goal in (must, aim)]
    return f'| {" | ".join([what, ours, show(ours), theirs, show(theirs), speed, *goals])} |'


def compute_ratio(ours: Measurement, theirs: Measurement) -> tuple[float, float, float]:
    """Returns the speed ratio of the medians, and the minimum and maximum over single rounds."""
    rounds = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    return statistics.median(theirs.seconds) / statistics.median(ours.seconds), min(rounds), max(rounds)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch_python', help='Python interpreter with PyTorch; without it PyTorch is not measured')
    parser.add_argument(
        '--only', type=lambda text: text.split(','), default=list(ROWS), help=f'rows to measure, from {",".join(ROWS)}'
    )
    parser.add_argument('--rounds', type=int, default=3, help='rounds per contender; half as many for epochs')
    parser.add_argument('--image_size', type=int, default=224, help='pixels, even')
    parser.add_argument(
        '--batch_size', type=int, default=16, help='images per step; four times as many for augmentation'
    )
    parser.add_argument('--num_slices', type=int, default=8000, help='number of training slices to prepare')
    parser.add_argument(
        '--workdir',
        type=lambda text: Path(text).absolute(),
        default=ROOT / 'runs' / 'benchmarks',
        help='folder for data and results',
    )
    options = parser.parse_args()
    unknown = set(options.only) - ROWS.keys()
    if unknown:
        parser.error(f'--only={",".join(sorted(unknown))}: unknown row; choose from {", ".join(ROWS)}')
    if options.torch_python is not None and shutil.which(options.torch_python) is None:
        parser.error(f'--torch_python={options.torch_python} is not an executable')
    if min(options.rounds, options.image_size, options.batch_size, options.num_slices) < 1:
        parser.error('--rounds, --image_size, --batch_size and --num_slices must be at least 1')
    return options


def main() -> None:
    options = parse_options()
    options.workdir.mkdir(parents=True, exist_ok=True)
    path = options.workdir / 'results.json'
    results = {'machine': describe_machine(), 'rounds': options.rounds, 'image_size': options.image_size, 'rows': {}}
    lines = ['| what | ours | | other | | ours over other (single rounds) | must | aim |', '|' + '---|' * 8]
    for name in options.only:
        say(f'{name}:')
        start = time.perf_counter()
        row = ROWS[name](options)
        lines += dict.fromkeys(format_line(comparison, measurements) for comparison, measurements in row)
        results['rows'][name] = {
            'comparisons': [
                {**comparison._asdict(), 'measurements': {key: m._asdict() for key, m in measurements.items()}}
                for comparison, measurements in row
            ],
            'took_seconds': round(time.perf_counter() - start),
        }
        for m in itertools.chain.from_iterable(measurements.values() for _, measurements in row):
            results['machine'].update((key, m.facts[key]) for key in PEERS if key in m.facts)
        write_json(path, results)  # after every row, so that an interruption keeps the finished rows
    print('\n'.join(lines))
    print(f'\n{format_facts(results["machine"])}')
    print(f'{options.image_size} pixels, float32 unless stated, medians of {options.rounds} alternating rounds')
    say(f'all rounds, page faults and peak memory: {path}')


def run_command(command: Callable[[], None]) -> None:
    """Runs a command of this folder; a user error or an interruption prints one line."""
    try:
        command()
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted: finished measurements are in the workdir, by default runs/benchmarks')


if __name__ == '__main__':
    run_command(main)
