"""What the part of ResNet50-ATT2 that eq. 11 makes dead would cost: parameters, and time with it and without it.

  python -m benchmarks.dead_tail

Runs alternate, and medians are compared, so that another program on the machine slows both alike.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict

from covidjax.fast import compile_fast
from covidjax.models.att2 import Att2, is_dead, normalise
from covidjax.training.optim import create_optimizer
from covidjax.training.state import create_train_state
from covidjax.training.step import train_step


def time_alternating(calls, rounds):
    """Returns the median seconds of every call, each of which is made once in every round after one to compile."""
    seconds = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if i:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def create_inference(model, *, full):
    return compile_fast(
        lambda variables, images: model.apply(variables, normalise(images), train=False, full=full).logits
    )


def create_training(model, variables, batch, *, full):
    """Returns a call that makes one step of Adam from the state that the last call left."""
    is_frozen = (lambda path: False) if full else functools.partial(is_dead, compatibility=model.compatibility)
    optimizer = create_optimizer(
        optax.constant_schedule(5e-4), weight_decay=0.0, decay='decoupled', is_frozen=is_frozen
    )

    def forward(variables, images, _):
        outputs, updates = model.apply(variables, images, train=True, full=full, mutable=['batch_stats'])
        return outputs.logits, updates['batch_stats']

    step = jax.jit(
        functools.partial(
            train_step, forward=forward, optimizer=optimizer, class_weights=(1.0, 1.0, 1.0), augmentation=None
        ),
        donate_argnums=0,
    )
    state = create_train_state(jax.tree.map(jnp.copy, variables), optimizer, jax.random.key(0))

    def call():
        nonlocal state
        state, sums = step(state, batch)
        return sums

    return call


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--batch_size', type=int, default=8)
    parser.add_argument('--image_size', type=int, default=224)
    parser.add_argument('--rounds', type=int, default=7)
    options = parser.parse_args()

    model, size = Att2(), options.image_size
    initialise = jax.jit(
        lambda key: model.init(key, jnp.zeros((1, size, size, 1)), train=False, full=True),
        compiler_options={'xla_backend_optimization_level': 0},
    )
    variables = initialise(jax.random.key(0))
    rng = np.random.default_rng(0)
    images = jnp.asarray(rng.integers(0, 256, (options.batch_size, size, size, 1), dtype=np.uint8))
    batch = {
        'image': images,
        'label': jnp.asarray(rng.integers(0, 3, options.batch_size), jnp.int32),
        'mask': jnp.ones(options.batch_size),
    }
    sizes = {path: leaf.size for path, leaf in flatten_dict(variables['params'], sep='/').items()}
    total = sum(sizes.values())
    dead = sum(count for path, count in sizes.items() if is_dead(path, model.compatibility))

    apply = {full: create_inference(model, full=full) for full in (True, False)}
    flops = {full: apply[full].lower(variables, images).cost_analysis()['flops'] for full in apply}
    inference = time_alternating(
        {full: functools.partial(apply[full], variables, images) for full in apply}, options.rounds
    )
    training = time_alternating(
        {full: create_training(model, variables, batch, full=full) for full in (True, False)}, options.rounds
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
