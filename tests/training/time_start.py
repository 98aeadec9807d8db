"""Measures the time from the start of a run to the end of its first step, by activity.

  python tests/training/time_start.py                          the slice demo: first without caches, then with them
  python tests/training/time_start.py --config=configs/att2.py:/data/covidx-ct --config.train.batch_size=8

'new' starts without prepared slices and compiled programs; 'kept' reuses those of 'new'.
"""

import collections
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

ROOT = Path(__file__).parents[2]
EVENTS = {
    '/jax/core/compile/jaxpr_trace_duration': 'tracing',
    '/jax/core/compile/jaxpr_to_mlir_module_duration': 'lowering',
    '/jax/core/compile/backend_compile_duration': 'compiling or loading programs',
}


def run_first_step(start):
    """Runs the command in a process started at `start`; prints the time to the end of its first step by activity."""
    import jax

    from covidjax import cli
    from covidjax.experiment import common, slices  # noqa: F401, measured as imports
    from covidjax.training import loop

    seconds = {'imports': time.time() - start}
    spans = collections.defaultdict(list)

    def note(event, duration, **_):
        if event in EVENTS:
            spans[EVENTS[event]].append((time.time() - duration, time.time()))

    def load_data(*arguments):
        begin = time.time()
        data = original_load(*arguments)
        seconds['data'] = time.time() - begin
        return data

    def fit(task, *arguments):
        def first_step(state, batch):
            jax.block_until_ready(task.step(state, batch))
            seconds.update({what: measure_union(spans[what]) for what in EVENTS.values()})
            end = time.time() - start
            seconds['the rest'] = end - sum(seconds.values())
            print(f'{end:.1f} s: ' + ', '.join(f'{what} {value:.1f}' for what, value in seconds.items()), flush=True)
            os._exit(0)

        return original_fit(task._replace(step=first_step), *arguments)

    jax.monitoring.register_event_duration_secs_listener(note)
    original_load, original_fit = common.load_data, loop.fit
    with mock.patch.object(common, 'load_data', load_data), mock.patch.object(loop, 'fit', fit):
        cli.main(['covidjax', 'train', *sys.argv[1:]])


def measure_union(spans):
    """Returns the length of the union of intervals (begin, end); traces of functions are nested."""
    total, reached = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0)
        reached = max(reached, end)
    return total


def main():
    """Runs the command twice, without and with caches."""
    if os.environ.get('START'):
        run_first_step(float(os.environ['START']))
    arguments = sys.argv[1:] or ['--config=configs/att2.py']
    with TemporaryDirectory() as folder:
        for what in ('new', 'kept'):
            environment = {
                **os.environ,
                'START': str(time.time()),
                'PYTHONPATH': str(ROOT),
                'TFDS_DATA_DIR': f'{folder}/prepared',
                'JAX_COMPILATION_CACHE_DIR': f'{folder}/programs',
            }
            command = [sys.executable, __file__, *arguments, f'--workdir={folder}/run']
            result = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
            print(f'{what}: {result.stdout.splitlines()[-1]}', flush=True)


if __name__ == '__main__':
    main()
