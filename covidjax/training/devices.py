"""Batches sharded over all devices, parameters on each of them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def create_shardings() -> tuple[NamedSharding, NamedSharding]:
    """Returns the sharding of batches (their first axis over all devices) and that of states (replicated)."""
    mesh = Mesh(np.array(jax.devices()), ('data',))
    return NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
