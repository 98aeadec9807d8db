import atexit
import os
import shutil
import tempfile
from pathlib import Path

# Compiling takes most of the time of the tests. As jax's own tests do, compile with few optimisations, also in
# processes that tests start. `.ci/run` runs a demo, faults and notebooks with all of them. jax reads it when imported.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

# All processes share compiled programs: workers of pytest-xdist and commands that tests start inherit the folder.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = tempfile.mkdtemp(prefix='covidjax-tests-xla-')
    atexit.register(shutil.rmtree, os.environ['JAX_COMPILATION_CACHE_DIR'], ignore_errors=True)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')

import jax
import pytest
from absl import flags

# grain asks absl for its flags, which nobody parses here.
flags.FLAGS.mark_as_parsed()
os.environ['HF_HUB_OFFLINE'] = '1'
jax.config.update('jax_numpy_rank_promotion', 'raise')


# pytest-xdist hands out whole files in this order: with the longest first, the processes end at about the same time.
LONGEST = (
    'test_cli.py',
    'training/test_devices.py',
    'models/test_parity.py',
    'experiment/test_lesions.py',
    'experiment/test_embeddings.py',
    'experiment/test_crossvalidate.py',
    'data/test_covidx_ct.py',
    'serve/test_page.py',
    'experiment/test_features.py',
    'predict/test_archive.py',
    'benchmarks/test_gpu.py',
    'experiment/test_ablation.py',
    'predict/test_scan.py',
    'data/test_slice_lungs.py',
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder of real CT data for trials; tests that need it skip where it is absent."""
    default = Path(__file__).parents[1].parent / 'shared' / 'data'
    folder = Path(os.environ.get('COVIDJAX_TEST_DATA', default))
    if not folder.is_dir():
        pytest.skip(f'no real CT data: set COVIDJAX_TEST_DATA (looked in {folder})')
    return folder
