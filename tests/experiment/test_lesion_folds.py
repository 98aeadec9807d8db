import json
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from covidjax.audit.overlap import measure_prepared
from covidjax.configs import lesions as lesions_config
from covidjax.errors import UserError
from covidjax.experiment import lesion_folds
from covidjax.experiment.config import save_config
from covidjax.experiment.lesion_folds import plan_lesions, read_seen_sources, train_lesions


def write_masked(folder, sources):
    """Writes two slices with a lesion of each source and split."""
    rng, lines = np.random.default_rng(0), ['image,lesion,split,source,patient']
    folder.mkdir()
    for source in sources:
        for split in ('train', 'val', 'test'):
            for i in range(2):
                name = f'{source}_{split}_{i}'
                small = rng.integers(0, 255, (8, 8), dtype=np.uint8)
                Image.fromarray(small).resize((64, 64)).save(folder / f'{name}.png')
                mask = np.zeros((64, 64), np.uint8)
                mask[10:30, 10:30] = 255
                Image.fromarray(mask).save(folder / f'{name}_lesion.png')
                lines.append(f'{name}.png,{name}_lesion.png,{split},{source},{name}')
    (folder / 'slices.csv').write_text('\n'.join(lines))
    return folder


def write_run(folder, masked, seen, *, sources='', pretrained=''):
    """Writes what is read of a finished lesion run."""
    folder.mkdir()
    config = lesions_config.get_config(str(masked)).unlock()
    config.data.image_size = 64
    config.data.sources, config.model.pretrained = sources, pretrained
    save_config(folder, config.lock())
    (folder / 'results.json').write_text(json.dumps({'dataset': {'sources': seen}}))
    return str(folder)


@pytest.fixture
def masked(tmp_path):
    return write_masked(tmp_path / 'masked', 'ABC')


def test_a_model_that_has_not_seen_the_sources_is_used_as_it_is(tmp_path, masked):
    run = write_run(tmp_path / 'run', masked, ['A', 'B'], sources='A,B')
    assert read_seen_sources(run) == {'A', 'B'}
    assert plan_lesions(run, {'C', 'D'}) is None
    assert 'coronacases' in read_seen_sources('box')
    assert plan_lesions('box', {'MosMedData'}) is None


@pytest.mark.parametrize(('chosen', 'expected'), [('A,B', 'A'), ('', 'A,C')])
def test_otherwise_it_is_trained_without_them(tmp_path, masked, chosen, expected):
    seen = ['A', 'B'] if chosen else ['A', 'B', 'C']
    run = write_run(tmp_path / 'run', masked, seen, sources=chosen)
    planned = plan_lesions(run, ['B'])
    assert planned.data.sources == expected
    assert planned.data.raw_dir == str(masked)
    assert planned.data.image_size == 64


def test_models_that_can_not_be_trained_without_the_sources(tmp_path, masked):
    with pytest.raises(UserError, match=r'config.lesions=box has seen coronacases, which a fold leaves out: name the'):
        plan_lesions('box', {'coronacases'})
    run = write_run(tmp_path / 'only', masked, ['B'], sources='B')
    with pytest.raises(UserError, match='has no sources but B, which a fold leaves out'):
        plan_lesions(run, {'B'})
    run = write_run(tmp_path / 'started', masked, ['A', 'B'], pretrained='box')
    assert read_seen_sources(run) >= {'A', 'B', 'coronacases', 'LIDC-IDRI'}
    with pytest.raises(UserError, match='started from box, which has seen coronacases: train one that starts'):
        plan_lesions(run, {'coronacases'})
    with pytest.raises(UserError, match=r'x\.safetensors does not say which sources'):
        plan_lesions(str(tmp_path / 'x.safetensors'), {'A'})
    with pytest.raises(UserError, match='not the workdir of a run'):
        plan_lesions(str(masked), {'A'})


def test_pictures_that_the_fold_holds_out_are_refused_under_another_name(tmp_path, masked, monkeypatch):
    trained = []
    monkeypatch.setattr(
        lesion_folds, 'lesions', types.SimpleNamespace(train=lambda *a: trained.append(a), find_start=lambda _: None)
    )
    run = write_run(tmp_path / 'run', masked, ['A', 'B', 'C'])
    planned = plan_lesions(run, {'B'})

    def hold_out(*names):
        return measure_prepared((name, np.asarray(Image.open(masked / f'{name}.png'))) for name in names)

    train_lesions(planned, tmp_path / 'fold', hold_out('B_train_0', 'B_val_1'), 'without B')
    assert trained == [(planned, tmp_path / 'fold')]
    with pytest.raises(UserError, match=r'without B: pictures that it holds out .*C_train_1 = masked/C_train_1.png'):
        train_lesions(planned, tmp_path / 'fold', hold_out('B_train_0', 'C_train_1'), 'without B')
    assert len(trained) == 1
    assert Path(lesion_folds.FOLDER) == Path('lesions')
