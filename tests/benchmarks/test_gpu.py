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

SETTINGS = gpu.TINY._replace(image_size=32)
BLOCKED = ('grain', 'tensorflow_datasets', 'ml_collections', 'absl', 'orbax', 'PIL', 'scipy.ndimage')


def lower(function, shapes):
    return jax.export.export(jax.jit(function), platforms=['cuda'])(*shapes)


@pytest.mark.parametrize(
    'program', gpu.list_programs(SETTINGS, (2,)), ids=lambda p: f'{p.what} {p.model} {p.precision}'
)
def test_programs_lower_for_cuda(program):
    exported = lower(program.function, jax.eval_shape(program.create_inputs))
    assert exported.platforms == ('cuda',)


def test_forms_lower_for_cuda():
    for form, _, shapes in gpu.list_forms().values():
        inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
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
