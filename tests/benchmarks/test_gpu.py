"""The script for an accelerator: it runs on a CPU without the data libraries, and every program lowers for CUDA."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import gpu

SETTINGS = gpu.TINY._replace(models={**gpu.TINY.models, 'light': gpu.WHOLE.models['light']})
BLOCKED = ('grain', 'tensorflow_datasets', 'ml_collections', 'PIL', 'joblib', 'filelock')  # absl is optax's


def lower(function, inputs):
    return jax.export.export(jax.jit(function), platforms=['cuda'])(*inputs)


# In bfloat16, the light model differs from the others by forms that are lowered below.
PROGRAMS = [p for p in gpu.list_programs(SETTINGS, (2,)) if (p.model, p.precision) != ('light', 'bfloat16')]


@pytest.mark.parametrize('program', PROGRAMS, ids=lambda p: f'{p.what} {p.model} {p.precision}')
def test_programs_lower_for_cuda(program):
    exported = lower(program.function, program.create_inputs())
    assert exported.platforms == ('cuda',)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_forms_lower_for_cuda(dtype):
    for form, _, shapes in gpu.list_forms().values():
        inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        assert lower(form, inputs).platforms == ('cuda',)


def test_it_runs_without_the_libraries_of_data(tmp_path):
    script = Path(gpu.__file__)
    code = (
        f'import sys, runpy; sys.modules.update(dict.fromkeys({BLOCKED!r})); '
        f'sys.argv = ["gpu.py", "--tiny", "--output={tmp_path}"]; runpy.run_path({str(script)!r}, run_name="__main__")'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / 'gpu.json').read_text())
    assert results['checks']
    assert all(row['ok'] for row in results['checks'])
    assert all(np.isfinite(row['images_per_s']) for row in results['speed'])
    assert (tmp_path / 'gpu.md').read_text().count('\n') > len(results['checks']) + len(results['speed'])
