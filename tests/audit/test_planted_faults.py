"""The audit finds and names each fault planted in clean phantoms, and nothing else."""

import shutil

import numpy as np
import pytest
from PIL import Image

from covidjax.audit.dataset import read_dataset
from covidjax.audit.run import check_dataset, run_audit
from covidjax.data.phantom import PhantomOptions, write_phantoms

# Checks that clean phantoms fail: class counts of no published dataset, short scans, lesions visible in thumbnails.
TRUE_OF_CLEAN = {'lists.version', 'scans.short', 'baselines.thumbnails'}
# Phantoms lack these columns, and there are too few of them for a verdict on file names.
NOT_CHECKED = {'metadata.country', 'metadata.sex', 'metadata.age', 'baselines.names', 'baselines.sources'}


@pytest.fixture(scope='module')
def clean(tmp_path_factory):
    folder = tmp_path_factory.mktemp('raw') / 'phantoms'
    write_phantoms(folder, PhantomOptions(num_train=24, num_val=12, num_test=12, image_size=64, max_slices=16))
    return folder


@pytest.fixture
def raw_dir(clean, tmp_path):
    return shutil.copytree(clean, tmp_path / 'raw')


def get_list(raw_dir, split):
    return raw_dir / f'{split}_COVIDx_CT-2A.txt'


def read_lines(raw_dir, split):
    return get_list(raw_dir, split).read_text().splitlines()


def write_lines(raw_dir, split, lines):
    get_list(raw_dir, split).write_text('\n'.join(lines) + '\n')


def add_copy(raw_dir, noise, number):
    """Adds a copy of a train image, with noise, to the last test scan; returns both file names."""
    original, _, *box = read_lines(raw_dir, 'train')[3].split()
    last = read_lines(raw_dir, 'test')[-1].split()
    copy = f'{last[0].rsplit("-", 1)[0]}-{number:04d}.png'
    pixels = np.asarray(Image.open(raw_dir / '2A_images' / original)).astype(float)
    pixels += noise * np.random.default_rng(0).standard_normal(pixels.shape)
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(raw_dir / '2A_images' / copy, compress_level=9)
    write_lines(raw_dir, 'test', [*read_lines(raw_dir, 'test'), ' '.join([copy, last[1], *box])])
    return original, copy


def plant_patient_in_two_splits(raw_dir):
    train = read_lines(raw_dir, 'train')
    scan = train[0].rsplit('-', 1)[0]
    own = [line for line in train if line.startswith(scan)]
    write_lines(raw_dir, 'train', own[3:] + train[len(own) :])
    write_lines(raw_dir, 'val', read_lines(raw_dir, 'val') + own[:3])
    return {'leakage.scans': [scan], 'leakage.patients': [scan]}


def plant_duplicate(raw_dir):
    return {'images.identical': add_copy(raw_dir, 0, 90)}


def plant_noisy_copy(raw_dir):
    return {'images.near_identical': add_copy(raw_dir, 2, 91)}


def plant_empty_box(raw_dir):
    lines = read_lines(raw_dir, 'val')
    file, label, xmin, ymin, _, ymax = lines[4].split()
    lines[4] = f'{file} {label} {xmin} {ymin} {xmin} {ymax}'
    write_lines(raw_dir, 'val', lines)
    return {'lists.rows': [f'val_COVIDx_CT-2A.txt:5: {file}: the box {xmin} {ymin} {xmin} {ymax} is empty']}


def plant_truncated_file(raw_dir):
    file = read_lines(raw_dir, 'train')[20].split()[0]
    data = (raw_dir / '2A_images' / file).read_bytes()
    (raw_dir / '2A_images' / file).write_bytes(data[: len(data) // 2])
    return {'images.readable': [file, 'truncated']}


def plant_row_without_file(raw_dir):
    file = read_lines(raw_dir, 'test')[2].split()[0]
    (raw_dir / '2A_images' / file).unlink()
    return {'images.missing': [f'{file} (test)']}


def plant_file_without_row(raw_dir):
    lines = read_lines(raw_dir, 'test')
    write_lines(raw_dir, 'test', lines[:6] + lines[7:])
    return {'images.unlisted': [lines[6].split()[0]]}


def plant_missing_class(raw_dir):
    lines = read_lines(raw_dir, 'val')
    for line in lines:
        if line.split()[1] == '1':
            (raw_dir / '2A_images' / line.split()[0]).unlink()
    write_lines(raw_dir, 'val', [line for line in lines if line.split()[1] != '1'])
    return {'lists.classes': ['val: no slice of class 1 (pneumonia)']}


PLANTED = (
    plant_patient_in_two_splits,
    plant_duplicate,
    plant_noisy_copy,
    plant_empty_box,
    plant_truncated_file,
    plant_row_without_file,
    plant_file_without_row,
    plant_missing_class,
)


def check_findings(checks, expected):
    """Compares faults and verdicts with the expected ones and those of clean phantoms."""
    by_name = {check.name: check for check in checks}
    for name, words in expected.items():
        check = by_name[name]
        assert check.verdict == ('look' if name == 'images.unlisted' else 'broken'), name
        assert len(check.faults) == 1, check.faults
        for word in words:
            assert word in check.faults[0]
    reported = {name for name, check in by_name.items() if check.verdict in ('look', 'broken')}
    assert reported - set(expected) <= TRUE_OF_CLEAN
    assert {name for name, check in by_name.items() if check.faults} == set(expected)
    assert {name for name, check in by_name.items() if check.verdict == 'not checked'} == NOT_CHECKED


def test_clean_phantoms(clean):
    check_findings(check_dataset(read_dataset(clean)), {})


@pytest.mark.parametrize('plant', PLANTED, ids=lambda plant: plant.__name__)
def test_each_fault_alone(raw_dir, plant):
    expected = plant(raw_dir)
    check_findings(check_dataset(read_dataset(raw_dir)), expected)


def test_all_faults_together(raw_dir, tmp_path, capsys):
    expected = {}
    # Plant faults that use line numbers before those that move lines.
    for plant in (*PLANTED[3:], *PLANTED[:3]):
        expected |= plant(raw_dir)
    audit = run_audit(raw_dir, tmp_path / 'audit')
    assert audit['verdict'] == 'broken'
    found = {check['name']: check['faults'] for check in audit['checks'] if check['faults']}
    assert set(found) == set(expected)
    assert all(len(faults) == 1 for faults in found.values())
    printed = capsys.readouterr().out
    page = (tmp_path / 'audit' / 'audit.html').read_text()
    for words in expected.values():
        for word in words:
            assert word in printed
            assert word in page  # none of the words needs HTML escaping
