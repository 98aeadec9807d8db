"""Settings of a process before it computes: the compilation cache, and memory between steps."""

import ctypes
import os
import sys
from pathlib import Path

import jax

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8


def use_compilation_cache() -> None:
    """Keeps compiled programs in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another."""
    if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
        folder = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache')
        jax.config.update('jax_compilation_cache_dir', str(folder / 'covidjax' / 'xla'))


def keep_freed_memory() -> None:
    """Lets glibc keep freed memory for later allocations; does nothing on other C libraries.

    A training step on a CPU allocates and frees gigabytes. By default glibc returns such blocks to the system at once
    and gets new ones, which the kernel clears page by page: 590,000 page faults and a third of the time of a step of
    ResNet50-ATT2. Blocks of this size are kept only in the main arena, hence one arena for all threads.
    """
    if not sys.platform.startswith('linux'):
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, 'gnu_get_libc_version'):
        for option, value in ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)
