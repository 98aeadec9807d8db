"""One step on many devices: examples divided over them, parameters on each.

The mesh spans the devices of all processes; each process loads and places those rows of a batch that its devices get.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from covidjax.errors import UserError
from covidjax.models.fast import compile_fast

AXIS = 'data'
PARALLELISMS = ('jit', 'pmap')


def create_shardings() -> tuple[NamedSharding, NamedSharding]:
    """Returns the sharding of batches (their first axis over all devices) and that of states (replicated)."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def get_shard() -> tuple[int, int]:
    """Returns the number of this process and that of all: which rows of every batch it loads."""
    return jax.process_index(), jax.process_count()


def check_batch_size(batch_size: int, accumulation_steps: int) -> None:
    """Checks that every device gets equally many examples in every part of a batch.

    Raises:
      UserError: it does not.
    """
    num_devices = jax.device_count()
    if batch_size % (num_devices * accumulation_steps):
        parts = f' in {accumulation_steps} parts' if accumulation_steps > 1 else ''
        raise UserError(
            f'config.train.batch_size={batch_size} does not divide over {num_devices} devices{parts}: pass a multiple '
            f'of {num_devices * accumulation_steps}'
        )


def pad_batch_size(batch_size: int) -> int:
    """Returns the next multiple of the number of devices: evaluation pads its batches."""
    return -(-batch_size // jax.device_count()) * jax.device_count()


def place_batch(batch: dict[str, np.ndarray], parallelism: str = 'jit') -> dict[str, jax.Array]:
    """Returns the batch of all processes on the devices.

    Args:
      batch: this process's rows [B, ...] of it.
      parallelism: under 'pmap' the arrays get an axis of devices before that of their rows.
    """
    sharding, _ = create_shardings()
    if parallelism == 'pmap':
        batch = {name: x.reshape(jax.local_device_count(), -1, *x.shape[1:]) for name, x in batch.items()}
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def place_state(state: Any) -> Any:
    """Returns the state, which every process has made alike, on all devices of all processes."""
    return jax.jit(lambda tree: tree, out_shardings=create_shardings()[1])(state)


def replicate(tree: Any) -> Any:
    """Gives every device, and so every process, the whole of arrays that are computed under `jit`."""
    return jax.lax.with_sharding_constraint(tree, create_shardings()[1])


def get_axis_name(parallelism: str) -> str | None:
    """Returns the axis over which a step, and its batch normalisation, must add up devices; None under 'jit'."""
    return AXIS if parallelism == 'pmap' else None


def compile_step(step: Callable[..., Any], parallelism: str) -> Callable[[Any, dict], Any]:
    """Compiles (state, batch, axis_name) -> (state, sums) for batches of `place_batch`; the state is donated.

    'jit' compiles the step of the whole batch and leaves its division to the compiler. 'pmap' compiles the step of one
    device's rows, which adds up the devices itself. States are replicated global arrays under both.
    """
    step = functools.partial(step, axis_name=get_axis_name(parallelism))
    if parallelism == 'jit':
        return compile_fast(step, donate_argnums=0)
    if parallelism != 'pmap':
        raise ValueError(f'parallelism must be one of {PARALLELISMS}, got {parallelism!r}')
    mapped = jax.pmap(
        step,
        axis_name=AXIS,
        in_axes=(None, 0),
        out_axes=(None, None),
        devices=jax.devices(),
        axis_size=jax.device_count(),
        donate_argnums=0,
    )
    if jax.process_count() == 1:
        return mapped
    mesh = create_shardings()[1].mesh
    # pmap returns what this process has of its results; checkpoints and validation take global arrays.
    return lambda state, batch: multihost_utils.host_local_array_to_global_array(
        mapped(state, batch), mesh, PartitionSpec()
    )
