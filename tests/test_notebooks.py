"""What can be said of the notebooks without running them; `python -m experiments.run_notebooks` does that."""

import json
from pathlib import Path

import pytest

from covidjax.configs import att2, seq
from experiments.demo import shorten

NOTEBOOKS = sorted((Path(__file__).parents[1] / 'experiments').glob('*.ipynb'))


def read_cells(path, kind):
    return [cell for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == kind]


def test_there_are_four_with_the_same_installation_and_settings():
    assert len(NOTEBOOKS) == 4
    assert len({json.dumps([cell['source'] for cell in read_cells(path, 'code')[:2]]) for path in NOTEBOOKS}) == 1


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_without_outputs(path):
    for cell in read_cells(path, 'code'):
        assert cell['outputs'] == []
        assert cell['execution_count'] is None


def test_phantoms_get_fewer_epochs_and_a_raw_directory_the_papers(monkeypatch):
    monkeypatch.delenv('COVIDJAX_NOTEBOOK_STEPS', raising=False)
    assert shorten(att2.get_config(), 3).train.num_epochs == 3
    assert shorten(att2.get_config('/data'), 3).train == att2.get_config('/data').train
    assert att2.get_config().train.num_epochs == 18  # the demo's own is left alone


def test_trials_get_one_epoch_of_so_many_steps(monkeypatch):
    monkeypatch.setenv('COVIDJAX_NOTEBOOK_STEPS', '5')
    slices, scans = shorten(att2.get_config('/data'), 3), shorten(seq.get_config(), 3)
    assert (slices.train.num_epochs, slices.train.steps_per_epoch) == (1, 5)
    assert slices.model.stage_sizes == (1, 1)
    assert slices.data.image_size == scans.data.image_size == 64
    assert scans.train.num_epochs == 1
    assert scans.model == seq.get_config().model
