import os
from pathlib import Path

# Compiling takes most of the time of the tests. As jax's own tests do, compile with few optimisations, also in
# processes that tests start. `.ci/run` runs a demo, faults and notebooks with all of them. jax reads it when imported.
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', '1')

import jax
import pytest
from absl import flags

# grain asks absl for its flags, which nobody parses here.
flags.FLAGS.mark_as_parsed()
os.environ['HF_HUB_OFFLINE'] = '1'
jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def real_data() -> Path:
    """The folder of real CT data for trials; tests that need it skip where it is absent."""
    default = Path(__file__).parents[1].parent / 'shared' / 'data'
    folder = Path(os.environ.get('COVIDJAX_TEST_DATA', default))
    if not folder.is_dir():
        pytest.skip(f'no real CT data: set COVIDJAX_TEST_DATA (looked in {folder})')
    return folder
