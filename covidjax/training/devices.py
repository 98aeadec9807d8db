"""Data-parallel steps: examples are sharded over the devices, parameters are replicated.

The mesh spans the devices of all processes. Each process loads and places only the rows of its own devices.
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
    """Returns the sharding of batches (first axis over all devices) and of states (replicated)."""
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    return NamedSharding(mesh, PartitionSpec(AXIS)), NamedSharding(mesh, PartitionSpec())


def get_shard() -> tuple[int, int]:
    """Returns (process index, number of processes), which select the rows of every batch that this process loads."""
    return jax.process_index(), jax.process_count()


def check_batch_size(batch_size: int, accumulation_steps: int) -> None:
    """Checks that every part of a batch divides evenly over the devices.

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
    """Rounds up to a multiple of the number of devices; evaluation pads its batches to this size."""
    return -(-batch_size // jax.device_count()) * jax.device_count()


def place_batch(batch: dict[str, np.ndarray], parallelism: str = 'jit') -> dict[str, jax.Array]:
    """Places a batch on the devices of all processes.

    Args:
      batch: this process's rows, [B, ...].
      parallelism: 'jit', or 'pmap', which adds a leading device axis.
    """
    sharding, _ = create_shardings()
    if parallelism == 'pmap':
        batch = {name: x.reshape(jax.local_device_count(), -1, *x.shape[1:]) for name, x in batch.items()}
    return {name: jax.make_array_from_process_local_data(sharding, x) for name, x in batch.items()}


def place_state(state: Any, create: Callable[[Any], Any] = lambda state: state) -> Any:
    """Replicates `create(state)` on all devices of all processes; every process passes the same state."""
    return jax.jit(create, out_shardings=create_shardings()[1])(state)


def replicate(tree: Any) -> Any:
    """Replicates arrays computed under `jit`, so that every device and process holds the whole of them."""
    return jax.lax.with_sharding_constraint(tree, create_shardings()[1])


def get_axis_name(parallelism: str) -> str | None:
    """Returns the axis over which a step and its batch normalisation must sum explicitly; None under 'jit'."""
    return AXIS if parallelism == 'pmap' else None


def compile_step(step: Callable[..., Any], parallelism: str) -> Callable[[Any, dict], Any]:
    """Compiles (state, batch, axis_name) -> (state, sums) for batches of `place_batch`; the state is donated.

    'jit' compiles the step for the whole batch and lets the compiler partition it. 'pmap' compiles the step for the
    rows of one device; the step sums over devices itself. States are replicated global arrays in both cases.

    Raises:
      ValueError: unknown parallelism.
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
    # pmap returns process-local arrays; checkpoints and validation need global ones.
    return lambda state, batch: multihost_utils.host_local_array_to_global_array(
        mapped(state, batch), mesh, PartitionSpec()
    )
