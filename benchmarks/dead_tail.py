"""Measures the cost of the part of ResNet50-ATT2 that cannot change its output (eq. 11): parameters, FLOP and time.

  python -m benchmarks.dead_tail

Runs with and without that part alternate, so that other load on the machine affects both equally. The table compares
medians.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from benchmarks.jax_worker import (
    create_inference,
    create_training,
    create_variables,
    draw_batch,
    draw_images,
)
from covidjax.models.att2 import Att2, is_dead
from covidjax.training import runtime
from covidjax.training.devices import compile_step


def time_alternating(calls, rounds):
    """Returns the median seconds of each call over rounds of one call each; one more round compiles."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def create_call(model, variables, batch, *, full):
    """Returns a function that makes one Adam step; each call continues from the state of the previous one."""
    state, step = create_training(model, variables, full=full, augmentation=None)
    compiled = compile_step(step, 'jit')

    def call():
        nonlocal state
        state, sums = compiled(state, batch)
        return sums

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--image_size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=7)
    options = parser.parse_args()

    runtime.use_compilation_cache()
    runtime.keep_freed_memory()
    model, size = Att2(), options.image_size
    variables = create_variables(model, size)
    images = jnp.asarray(draw_images(options.batch_size, size))
    batch = draw_batch(options.batch_size, size)
    sizes = {path: leaf.size for path, leaf in flatten_dict(variables['params'], sep='/').items()}
    total = sum(sizes.values())
    dead = sum(count for path, count in sizes.items() if is_dead(path, model.compatibility))

    apply = {full: create_inference(model, full=full) for full in (True, False)}
    flops = {full: apply[full].lower(variables, images).cost_analysis()['flops'] for full in apply}
    inference = time_alternating(
        {full: functools.partial(apply[full], variables, images) for full in apply}, options.rounds
    )
    training = time_alternating(
        {full: create_call(model, variables, batch, full=full) for full in (True, False)}, options.rounds
    )
    print(f'{options.batch_size} slices of {size} pixels, medians of {options.rounds} alternating runs; ', end='')
    print(f'jax {jax.__version__}, {len(jax.devices())} x {jax.devices()[0].device_kind}\n')
    print('| | parameters trained | inference, GFLOP per slice | ms per slice | training, s per step |')
    print('|---|---|---|---|---|')
    for full, name in ((True, 'eq. 11 as printed, with the tail'), (False, 'as it is computed here')):
        gflop, ms = flops[full] / 1e9 / options.batch_size, 1000 * inference[full] / options.batch_size
        print(f'| {name} | {total - (0 if full else dead):,} | {gflop:.2f} | {ms:.0f} | {training[full]:.2f} |')
    ratios = [f'{values[False] / values[True]:.2f}' for values in (flops, inference, training)]
    print(f'| ratio | {(total - dead) / total:.2f} | {" | ".join(ratios)} |')


if __name__ == '__main__':
    main()
