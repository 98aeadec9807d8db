"""Compares training on several devices and processes with training on one device.

  python tests/training/compare_devices.py        the paper's two models; half an hour on two cores
  python tests/training/compare_devices.py --cases seq --dtypes float64 --settings jit,8,1 pmap,4,4     a part of it

Each run uses one, two or four processes (on loopback) with virtual CPU devices. In float64 it compares parameters,
batch statistics, optimizer state and sums of five steps, and the logits after them; in float32 the loss of the first
step. `test_devices.py` does the same with small models.
"""

import argparse
import functools
import itertools
import os
import socket
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

ROOT = Path(__file__).parents[2]
NUM_STEPS = 5
BATCH_SIZE = 8
NUM_EVALUATED = 13  # not divisible by any number of devices
NUM_SLICES = 16
CASES = ('att2', 'seq', 'small att2', 'small seq')


def train(case, parallelism):
    """Returns all arrays after five steps of a model, and of an evaluation after them, by name."""
    # Imported late: devices and processes must be set before jax starts.
    import jax
    import jax.numpy as jnp
    import optax

    from covidjax.data.loader import load_eval_batches
    from covidjax.evaluation.predictions import compute_logits
    from covidjax.experiment import scans, slices
    from covidjax.models.att2 import Att2, is_dead
    from covidjax.models.seq import Seq, is_extractor
    from covidjax.training.augment import AugmentOptions
    from covidjax.training.devices import (
        compile_step,
        get_axis_name,
        get_shard,
        pad_batch_size,
        place_batch,
        place_state,
    )
    from covidjax.training.losses import create_cross_entropy
    from covidjax.training.optimizer import create_optimizer
    from covidjax.training.state import create_train_state
    from covidjax.training.step import train_step
    from tests.variables import draw_variables

    rng = np.random.default_rng(0)
    is_small, is_seq = 'small' in case, 'seq' in case
    # At 32 pixels the last maps of ResNet-50 have one position; BatchNorm over eight numbers amplifies rounding.
    size = 64 if case == 'att2' else 32
    channels = NUM_SLICES if is_seq else 1
    images = jnp.zeros((1, size, size, channels))
    model = Att2((1, 1), width=4, block='basic', stem='small', tail_blocks=1) if is_small else Att2()
    if is_seq:
        model = Seq(model, hidden=4 if is_small else 128)
        variables = draw_variables(model, images, jnp.ones(1, jnp.int32))

        def forward(variables, images, batch):
            return model.apply(variables, images, batch['length']).logits, variables['batch_stats']

    else:
        trained = model.clone(axis_name=get_axis_name(parallelism))
        variables = draw_variables(model, images, train=False, full=True)

        def forward(variables, images, _):
            outputs, updates = trained.apply(variables, images, train=True, mutable=['batch_stats'])
            return outputs.logits, updates['batch_stats']

    def draw_batch(num_masked):
        # Blocks of grey: with white noise all images look alike to the last layers.
        fields = rng.integers(0, 256, (BATCH_SIZE, 4, 4, channels), dtype=np.uint8)
        return {
            'image': fields.repeat(size // 4, 1).repeat(size // 4, 2),
            'label': rng.integers(0, 3, BATCH_SIZE, dtype=np.int32),
            'length': rng.integers(1, NUM_SLICES + 1, BATCH_SIZE, dtype=np.int32),
            'mask': np.float32(np.arange(BATCH_SIZE) < BATCH_SIZE - num_masked),
        }

    optimizer = create_optimizer(
        optax.constant_schedule(1e-4),
        weight_decay=5e-3,
        decay='decoupled',
        is_frozen=is_extractor if is_seq else functools.partial(is_dead, compatibility='additive'),
    )
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.result_type(float)), variables)
    state = place_state(create_train_state(variables, optimizer, jax.random.key(1)))
    step = compile_step(
        functools.partial(
            train_step,
            forward=forward,
            optimizer=optimizer,
            objective=create_cross_entropy((0.5, 1.0, 0.25)),
            augmentation=AugmentOptions(),
        ),
        parallelism,
    )
    process, num_processes = get_shard()
    rows = slice(process * BATCH_SIZE // num_processes, (process + 1) * BATCH_SIZE // num_processes)
    results = {}
    for k in range(NUM_STEPS):
        batch = {name: array[rows] for name, array in draw_batch(k).items()}
        state, sums = step(state, place_batch(batch, parallelism))
        results |= {f'sums {k} {name}': value for name, value in sums.items()}
    if is_seq:
        outputs = scans._apply(model, state.variables, place_batch(batch))
        results |= {'logits': outputs.logits, 'attention': outputs.attention}
    else:
        source = [{'image': rng.integers(0, 256, (size, size, 1), dtype=np.uint8), 'label': 0}] * NUM_EVALUATED
        batches = load_eval_batches(source, batch_size=pad_batch_size(5), shard=get_shard())
        apply = functools.partial(slices._apply, model)
        results['logits'] = compute_logits(apply, state.variables, map(place_batch, batches), NUM_EVALUATED)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.batch_stats, state.opt_state)):
        results[jax.tree_util.keystr(path)] = leaf
    return {name: np.asarray(value) for name, value in results.items()}


def run_process(case, dtype, parallelism, output, coordinator, num_processes, process_id):
    """Runs one process of `run`."""
    import jax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads the flags
    jax.config.update('jax_enable_x64', dtype == 'float64')
    if coordinator:
        jax.distributed.initialize(
            coordinator, int(num_processes), int(process_id), cluster_detection_method='deactivate'
        )
    results = train(case, parallelism)
    if process_id == '0':
        np.savez(output, **results)


def run(folder, case, *, dtype='float64', parallelism='jit', devices=1, processes=1):
    """Trains one of CASES with these numbers of devices and processes; returns the arrays of `train` by name."""
    output = Path(folder) / f'{case}-{dtype}-{parallelism}-{devices}-{processes}.npz'
    environment = {
        **os.environ,
        'NPROC': '8',  # with fewer threads than devices their all-reduce can deadlock
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // processes}',
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
    }
    with socket.socket() as free:
        free.bind(('localhost', 0))
        coordinator = f'localhost:{free.getsockname()[1]}' if processes > 1 else ''
    command = [sys.executable, __file__, '--process', case, dtype, parallelism, output, coordinator, str(processes)]
    started = [
        subprocess.Popen(
            [*command, str(p)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for p in range(processes)
    ]
    try:
        for process in started:
            text, _ = process.communicate(timeout=1200)
            if process.returncode:
                raise RuntimeError(text[-3000:])
    finally:
        for process in started:
            process.kill()
    return dict(np.load(output))


def compare(one, other):
    """Returns the largest difference between two runs, relative to the maximum of an array if that is above 1."""
    if one.keys() != other.keys():
        raise ValueError(f'only one of the runs has {one.keys() ^ other.keys()}')
    return max(
        float(np.max(np.abs(one[name] - other[name]), initial=0) / max(1, np.max(np.abs(one[name]), initial=0)))
        for name in one
    )


def compare_first_loss(one, other):
    """Returns the absolute difference of the mean weighted losses of the first step."""
    losses = [results['sums 0 loss'] / results['sums 0 weight'] for results in (one, other)]
    return abs(float(losses[0] - losses[1]))


def read_setting(text):
    """Parses 'pmap,4,2' to ('pmap', 4, 2): four devices in two processes."""
    parallelism, devices, processes = text.split(',')
    return parallelism, int(devices), int(processes)


# parallelism,devices,processes
DEVICES = ('pmap,1,1', 'jit,2,1', 'pmap,2,1', 'jit,8,1', 'pmap,8,1')
PROCESSES = ('jit,2,2', 'pmap,2,2', 'jit,4,4', 'pmap,4,4')
CHECKS = {
    'float64': ('all arrays after five steps', compare, 1e-9, DEVICES + PROCESSES),
    'float32': ("the first step's loss", compare_first_loss, 1e-5, DEVICES),
}


def main():
    """Prints one line per setting; exits with status 1 if one of them differs too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--cases', nargs='+', default=CASES[:2], choices=CASES)
    parser.add_argument('--dtypes', nargs='+', default=list(CHECKS), choices=CHECKS)
    parser.add_argument('--settings', nargs='+', help='parallelism,devices,processes; default: all')
    parser.add_argument('--process', nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.process:
        run_process(*options.process)
        return
    failed = False
    with TemporaryDirectory() as folder:
        for case, dtype in itertools.product(options.cases, options.dtypes):
            what, measure, bound, settings = CHECKS[dtype]
            one = run(folder, case, dtype=dtype)
            for setting in options.settings or settings:
                parallelism, devices, processes = read_setting(setting)
                other = run(folder, case, dtype=dtype, parallelism=parallelism, devices=devices, processes=processes)
                difference = measure(one, other)
                failed |= not difference <= bound
                print(
                    f'{case}, {dtype}, {parallelism}, {devices} devices in {processes} processes: {what} within '
                    f'{difference:.1e} of one device under jit',
                    flush=True,
                )
    sys.exit(failed)


if __name__ == '__main__':
    main()
