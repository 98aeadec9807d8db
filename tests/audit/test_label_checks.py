import csv

import numpy as np
import pytest

from covidjax.audit import run
from covidjax.audit.label_checks import read_predictions
from covidjax.data.lists import CLASSES, parse_scan
from covidjax.data.phantom import PhantomOptions, write_phantoms
from covidjax.errors import UserError


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw') / 'phantoms'
    write_phantoms(
        folder, PhantomOptions(num_train=9, num_val=3, num_test=3, image_size=48, min_slices=4, max_slices=5)
    )
    return folder


def write(path, shares):
    with path.open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', *(f'p_{name}' for name in CLASSES)])
        writer.writerows([name, *p] for name, p in shares.items())
    return path


def predict_lists(raw_dir):
    """Returns the probabilities of a model that is right about every slice of train and val."""
    rows = [
        line.split()[:2]
        for split in ('train', 'val')
        for line in (raw_dir / f'{split}_COVIDx_CT-2A.txt').read_text().splitlines()
    ]
    return {file: (0.8 * np.eye(3)[int(label)] + 0.2 / 3).tolist() for file, label in rows}


def test_a_contradicted_scan_is_listed_with_its_picture(raw_dir, tmp_path):
    shares = predict_lists(raw_dir)
    scan = parse_scan(next(iter(shares)))[0]
    wrong = [file for file in shares if parse_scan(file)[0] == scan]
    assert len(wrong) > 3
    label = int(np.argmax(shares[wrong[0]]))
    for file in wrong:
        shares[file] = (0.9 * np.eye(3)[(label + 1) % 3] + 0.1 / 3).tolist()
    path = write(tmp_path / 'predictions.csv', shares)
    audit = run.run_audit(raw_dir, tmp_path / 'out', path)
    [check] = [check for check in audit['checks'] if check['name'] == 'labels.model']
    assert check['verdict'] == 'look'
    assert check['num_faults'] == 1 + len(wrong)
    assert check['faults'][0].startswith(f'scan {scan}: {CLASSES[label]} in the lists, rather')
    page = (tmp_path / 'out' / 'audit.html').read_text()
    assert 'The scans whose labels are the most suspicious' in page
    assert f'of {len(shares):,} slices' in check['reason']


def test_predictions_that_agree_and_of_other_files(raw_dir, tmp_path):
    shares = predict_lists(raw_dir)
    for name, verdict in (('agree', 'ok'), ('other', 'not checked')):
        given = shares if name == 'agree' else {f'x{file}': p for file, p in shares.items()}
        audit = run.run_audit(raw_dir, tmp_path / name, write(tmp_path / f'{name}.csv', given))
        [check] = [check for check in audit['checks'] if check['name'] == 'labels.model']
        assert check['verdict'] == verdict


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        (None, 'cannot be read'),
        ('scan,p_normal\n', 'has no column file, p_covid19, p_pneumonia'),
        ('file,p_normal,p_pneumonia,p_covid19\na.png,1,x,0\n', 'is damaged'),
        ('file,p_normal,p_pneumonia,p_covid19\na.png,1\n', 'is damaged'),
        ('file,p_normal,p_pneumonia,p_covid19\na.png,1,1,0\n', 'do not sum to 1'),
        ('file,p_normal,p_pneumonia,p_covid19\na.png,nan,1,0\n', 'do not sum to 1'),
    ],
)
def test_tables_that_are_none(tmp_path, text, words):
    if text is not None:
        (tmp_path / 'p.csv').write_text(text)
    with pytest.raises(UserError, match=words):
        read_predictions(tmp_path / 'p.csv')
