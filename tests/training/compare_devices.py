"""Trains on several devices and processes and compares what comes out with one device.

  python tests/training/compare_devices.py                 the full models; about ten minutes on two cores
  python tests/training/compare_devices.py --small         small ones

Every run is a process of its own (or two or four, on loopback), with virtual CPU devices. In float64 the parameters,
batch statistics, optimizer state, sums and logits after five steps are compared, in float32 the first step's loss.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
NUM_STEPS = 5
BATCH_SIZE = 8
NUM_EVALUATED = 13  # divides over no number of devices


def create_case(name):
    """Returns model, forward (of axis_name), is_frozen, size of a slice and slices of a scan (None: no scans)."""
    from covidjax.models.att2 import Att2, is_dead
    from covidjax.models.seq import Seq, is_extractor

    small = Att2(stage_sizes=(1, 1), width=8, stem='small', tail_blocks=1)
    extractor = {'att2': Att2(), 'seq': Att2()}.get(name, small)
    if 'att2' in name:

        def forward(axis_name, variables, images, _):
            model = extractor.clone(axis_name=axis_name)
            outputs, updates = model.apply(variables, images, train=True, mutable=['batch_stats'])
            return outputs.logits, updates['batch_stats']

        return extractor, forward, functools.partial(is_dead, compatibility='additive'), None
    model = Seq(extractor, hidden=128 if name == 'seq' else 4)

    def forward(axis_name, variables, images, batch):
        return model.apply(variables, images, batch['length']).logits, variables['batch_stats']

    return model, forward, is_extractor, 16


def draw_images(rng, shape):
    """Draws images of 4 x 4 fields of grey: under white noise they all look alike to the last layers, whose BatchNorm
    then blows up rounding errors."""
    fields = rng.integers(0, 256, (shape[0], 4, 4, shape[3]), dtype=np.uint8)
    return fields.repeat(shape[1] // 4, 1).repeat(shape[2] // 4, 2)


def train(case, dtype, parallelism, accumulation_steps, output, coordinator, num_processes, process_id):
    """Trains five steps, evaluates, and writes all that came out as .npz."""
    import jax

    jax.config.update('jax_enable_x64', dtype == 'float64')
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id, cluster_detection_method='deactivate')
    import jax.numpy as jnp
    import optax
    from absl import flags

    from covidjax import scan_experiment, slice_experiment
    from covidjax.data.augment import AugmentOptions
    from covidjax.data.loader import load_eval_batches
    from covidjax.evaluation.predictions import compute_logits
    from covidjax.training.devices import (
        compile_step,
        get_axis_name,
        get_shard,
        pad_batch_size,
        place_batch,
        place_state,
    )
    from covidjax.training.optim import create_optimizer
    from covidjax.training.state import create_train_state
    from covidjax.training.step import train_step
    from tests.variables import draw_variables

    flags.FLAGS.mark_as_parsed()  # grain asks for them
    model, forward, is_frozen, num_slices = create_case(case)
    size = 64 if case == 'att2' else 32
    images = jnp.zeros((1, size, size, num_slices or 1))
    variables = (
        draw_variables(model, images, jnp.ones(1, jnp.int32))
        if num_slices
        else draw_variables(model, images, train=False, full=True)
    )
    variables = jax.tree.map(lambda leaf: leaf.astype(dtype), variables)
    optimizer = create_optimizer(
        optax.constant_schedule(1e-4), weight_decay=5e-3, decay='decoupled', is_frozen=is_frozen
    )
    state = place_state(create_train_state(variables, optimizer, jax.random.key(1)))
    step = compile_step(
        functools.partial(
            train_step,
            forward=functools.partial(forward, get_axis_name(parallelism)),
            optimizer=optimizer,
            class_weights=(0.5, 1.0, 0.25),
            augmentation=AugmentOptions(),
            accumulation_steps=accumulation_steps,
        ),
        parallelism,
    )
    process, processes = get_shard()
    rows = slice(process * BATCH_SIZE // processes, (process + 1) * BATCH_SIZE // processes)
    rng = np.random.default_rng(0)
    results = {}
    for k in range(NUM_STEPS):
        batch = {
            'image': draw_images(rng, (BATCH_SIZE, size, size, num_slices or 1)),
            'label': rng.integers(0, 3, BATCH_SIZE, dtype=np.int32),
            'length': rng.integers(1, 17, BATCH_SIZE, dtype=np.int32),
            'mask': np.float32(np.arange(BATCH_SIZE) < BATCH_SIZE - k),
        }
        local = {name: array[rows] for name, array in batch.items()}
        state, sums = step(state, place_batch(local, parallelism))
        results |= {f'sums/{k}/{name}': value for name, value in sums.items()}
    if not num_slices:
        source = [
            {'image': rng.integers(0, 256, (size, size, 1), dtype=np.uint8), 'label': 0} for _ in range(NUM_EVALUATED)
        ]
        batches = load_eval_batches(source, batch_size=pad_batch_size(5), shard=get_shard())
        apply = functools.partial(slice_experiment._apply, model)
        results['logits'] = compute_logits(apply, state.variables, map(place_batch, batches), NUM_EVALUATED)
    else:
        outputs = scan_experiment._apply(model, state.variables, place_batch(local))
        results |= {'logits': outputs.logits, 'attention': outputs.attention}
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.batch_stats, state.opt_state)):
        results[jax.tree_util.keystr(path)] = leaf
    if process == 0:
        np.savez(output, **{name: np.asarray(value) for name, value in results.items()})


def run(folder, case, *, dtype='float64', parallelism='jit', devices=1, processes=1, accumulation_steps=1):
    """Runs `train` on that many devices of so many processes and returns its arrays."""
    output = Path(folder) / f'{case}-{dtype}-{parallelism}-{devices}-{processes}-{accumulation_steps}.npz'
    environment = {
        **os.environ,
        'NPROC': '8',  # fewer threads than devices can end in a deadlock of their all-reduce
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices // processes}',
        'JAX_PLATFORMS': 'cpu',
        'PYTHONPATH': str(ROOT),
    }
    with socket.socket() as free:
        free.bind(('localhost', 0))
        coordinator = f'localhost:{free.getsockname()[1]}' if processes > 1 else ''
    arguments = [case, dtype, parallelism, accumulation_steps, output, coordinator, processes]
    started = [
        subprocess.Popen(
            [sys.executable, __file__, '--run', *map(str, arguments), str(p)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for p in range(processes)
    ]
    try:
        for process in started:
            text, _ = process.communicate(timeout=900)
            if process.returncode:
                raise RuntimeError(text[-3000:])
    finally:
        for process in started:
            process.kill()
    return dict(np.load(output))


def compare(one, other):
    """Returns the largest difference of two runs, each array's divided by its maximum where that is above 1."""
    if one.keys() != other.keys():
        raise ValueError(f'the runs differ in {one.keys() ^ other.keys()}')
    return max(
        float(np.max(np.abs(one[name] - other[name]), initial=0) / max(1, np.max(np.abs(one[name]), initial=0)))
        for name in one
    )


def first_loss(results):
    """Returns the mean weighted loss of the first step."""
    return float(results['sums/0/loss'] / results['sums/0/weight'])


def main():
    """Prints a line per setting; exit status 1 if one disagrees."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--small', action='store_true')
    parser.add_argument('--run', nargs=8, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        case, dtype, parallelism, accumulation_steps, output, coordinator, processes, process = options.run
        train(case, dtype, parallelism, int(accumulation_steps), output, coordinator, int(processes), int(process))
        return
    settings = [('pmap', 1, 1), *((p, n, 1) for n in (2, 8) for p in ('jit', 'pmap'))]
    settings += [(p, n, n) for n in (2, 4) for p in ('jit', 'pmap')]
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        for case in ('small att2', 'small seq') if options.small else ('att2', 'seq'):
            for dtype in ('float64', 'float32'):
                one = run(folder, case, dtype=dtype)
                for parallelism, devices, processes in (
                    settings if dtype == 'float64' else [('jit', 8, 1), ('pmap', 8, 1)]
                ):
                    other = run(
                        folder, case, dtype=dtype, parallelism=parallelism, devices=devices, processes=processes
                    )
                    difference = compare(one, other) if dtype == 'float64' else abs(first_loss(one) - first_loss(other))
                    bound = 1e-9 if dtype == 'float64' else 1e-5
                    failed |= not difference <= bound
                    what = 'all arrays after 5 steps' if dtype == 'float64' else 'loss of the first step'
                    print(
                        f'{case}, {dtype}, {parallelism} on {devices} devices of {processes} processes: {what} within '
                        f'{difference:.1e} of one device under jit',
                        flush=True,
                    )
    sys.exit(failed)


if __name__ == '__main__':
    main()
