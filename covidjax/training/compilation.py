"""The compilation cache: what one run compiled, the next one on this machine loads."""

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        jax.config.update('jax_compilation_cache_dir', str(folder / 'covidjax' / 'xla'))
