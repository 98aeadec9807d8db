"""Executes the notebooks from top to bottom, in their order; the first error ends it with the cell and its traceback.

  python -m experiments.run_notebooks                               a trial: hardly any training, see demo.py
  python -m experiments.run_notebooks --full                        as they stand
  python -m experiments.run_notebooks --output=/tmp/seen 1_data     one of them, kept with its outputs and runs

Needs requirements-dev.txt. The notebooks here stay as they are; a temporary folder, or --output, takes what they make.
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


def execute(name: str, output: Path) -> None:
    """Executes a notebook in the folder `output` and writes it there with its outputs, also if a cell fails."""
    notebook = nbformat.read(FOLDER / f'{name}.ipynb', as_version=4)
    client = NotebookClient(notebook, timeout=None, resources={'metadata': {'path': str(output)}})
    try:
        client.execute()
    finally:
        nbformat.write(notebook, output / f'{name}.ipynb')


def main() -> None:
    """Executes what the command line names, by default all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(path.stem for path in FOLDER.glob('*.ipynb'))
    parser.add_argument('names', nargs='*', metavar='name', help=f'some of {", ".join(every)}; by default all')
    parser.add_argument('--full', action='store_true', help='train as the notebooks say')
    parser.add_argument('--output', type=Path, help='folder to keep executed notebooks and their runs in')
    options = parser.parse_args()
    unknown = set(options.names) - set(every)
    if unknown:
        parser.error(f'no notebook {", ".join(sorted(unknown))}: there are {", ".join(every)}')

    os.environ['PYTHONPATH'] = os.pathsep.join([str(FOLDER.parent), *filter(None, [os.environ.get('PYTHONPATH')])])
    if not options.full:
        os.environ.setdefault('COVIDJAX_NOTEBOOK_STEPS', '5')
    with contextlib.ExitStack() as stack:
        output = options.output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        output.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault('TFDS_DATA_DIR', str(output.absolute() / 'prepared'))
        for name in options.names or every:
            start = time.perf_counter()
            try:
                execute(name, output)
            except CellExecutionError as error:
                sys.exit(f'{name}: {error}')
            print(f'{name}: {time.perf_counter() - start:.0f} s', flush=True)


if __name__ == '__main__':
    main()
