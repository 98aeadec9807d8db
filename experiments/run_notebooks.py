"""Executes the notebooks in order; stops at the first error and prints the cell and its traceback.

  python -m experiments.run_notebooks                               a test with few phantoms and little training
  python -m experiments.run_notebooks --full                        the full training of each notebook
  python -m experiments.run_notebooks --output=/tmp/seen 1_data     one notebook; keeps its outputs and runs

Needs requirements-dev.txt. The notebooks here are not modified; results go to a temporary folder, or to --output.
"""

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).resolve().parent


# A test draws a tenth of the demo's phantoms.
FEW_PHANTOMS = """
import functools
from covidjax.data import phantom
phantom.PhantomOptions = functools.partial(phantom.PhantomOptions, num_train=30, num_val=12, num_test=12)
"""


def execute(name: str, output: Path, *, is_short: bool) -> None:
    """Executes a notebook in the folder `output` and saves it there with its outputs, even if a cell fails."""
    notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    if is_short:
        notebook.cells.insert(0, nbformat.v4.new_code_cell(FEW_PHANTOMS))
    client = NotebookClient(notebook, timeout=None, resources={'metadata': {'path': str(output)}})
    try:
        client.execute()
    finally:
        nbformat.write(notebook, output / f'{name}.ipynb')


def main() -> None:
    """Executes the notebooks named on the command line, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.stem for path in FOLDER.glob('*.ipynb'))
    parser.add_argument(
        'names', nargs='*', metavar='name', help=f'notebooks to execute, from {", ".join(every)}; default: all'
    )
    parser.add_argument('--full', action='store_true', help='train as long as the notebooks specify')
    parser.add_argument('--output', type=Path, help='folder for the executed notebooks and their runs')
    options = parser.parse_args()
    unknown = set(options.names) - set(every)
    if unknown:
        parser.error(f'unknown notebook {", ".join(sorted(unknown))}; choose from {", ".join(every)}')

    os.environ['PYTHONPATH'] = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    if not options.full:
        os.environ.setdefault('COVIDJAX_NOTEBOOK_STEPS', '5')
        os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')  # notebooks share programs
    with contextlib.ExitStack() as stack:
        output = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault('TFDS_DATA_DIR', str(output.absolute() / 'prepared'))
        for name in options.names or every:
            start = time.perf_counter()
            try:
                execute(name, output, is_short=not options.full)
            except CellExecutionError as error:
                sys.exit(f'{name}: {error}')
            print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    main()
