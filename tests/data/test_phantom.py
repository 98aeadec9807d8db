import dataclasses
import json

import joblib
import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import RidgeClassifier

from covidjax.data import phantom
from covidjax.errors import UserError

OPTIONS = phantom.PhantomOptions(num_train=9, num_val=4, num_test=3, max_slices=14)
IMAGE_ROWS = {'train': 9, 'val': 4, 'test': 3}


@pytest.fixture(scope='module')
def raw_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('phantoms') / 'made' / 'raw'
    phantom.write_phantoms(folder, OPTIONS)
    return folder


def read_list(raw_dir, split):
    rows = []
    for line in (raw_dir / f'{split}_COVIDx_CT-2A.txt').read_text().splitlines():
        name, *numbers = line.split(' ')
        label, *box = map(int, numbers)
        rows.append((name, label, tuple(box)))
    return rows


def read_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def make_thumbnails(split, patients):
    """Returns flat 32x32 thumbnails of box-cropped slices in 0..1, and their labels. Patient n has class n % 3."""
    options = phantom.PhantomOptions()
    pixels, labels = [], []
    for number in patients:
        images, _, boxes = phantom.render_scan(options, split, number, number % 3)
        for image, box in zip(images, boxes, strict=True):
            small = Image.fromarray(image).crop(tuple(map(int, box))).resize((32, 32), Image.Resampling.BICUBIC)
            pixels.append(np.asarray(small, np.float32).ravel() / 255)
            labels.append(number % 3)
    return np.stack(pixels), np.array(labels)


@pytest.fixture(scope='module')
def sick_scans():
    """Returns (label, images, masks, boxes) of 40 sick scans at the default sizes."""
    options = phantom.PhantomOptions()
    return [(1 + n % 2, *phantom.render_scan(options, 'train', n, 1 + n % 2)) for n in range(40)]


def test_folder_has_the_raw_layout(raw_dir):
    names = {path.name for path in raw_dir.iterdir()}
    lists = {f'{split}_COVIDx_CT-2A.txt' for split in phantom.SPLITS}
    assert names == {'2A_images', 'lesion_masks', 'lung_masks', 'metadata.csv', 'phantoms.json'} | lists
    listed = [name for split in phantom.SPLITS for name, _, _ in read_list(raw_dir, split)]
    assert sorted(listed) == sorted(path.name for path in (raw_dir / '2A_images').iterdir())
    assert {path.name for path in (raw_dir / 'lesion_masks').iterdir()} < set(listed)
    assert json.loads((raw_dir / 'phantoms.json').read_text())['num_train'] == 9


def test_lists_are_contiguous_in_slice_order_and_boxes_lie_in_the_image(raw_dir):
    for split, num_patients in IMAGE_ROWS.items():
        rows = read_list(raw_dir, split)
        scans = {}
        for name, label, (xmin, ymin, xmax, ymax) in rows:
            prefix, seed, patient, index = name.removesuffix('.png').split('-')
            assert (prefix, seed, len(patient), len(index)) == ('phantom1', '0', 4, 4)
            scans.setdefault((patient, label), []).append(int(index))
            assert 0 <= xmin < xmax <= OPTIONS.image_size
            assert 0 <= ymin < ymax <= OPTIONS.image_size
        assert len(scans) == num_patients
        assert [index for indices in scans.values() for index in indices] == [
            int(name[-8:-4]) for name, _, _ in rows
        ]  # fails if the rows of a scan are not contiguous
        for indices in scans.values():
            assert indices == list(range(len(indices)))
            assert OPTIONS.min_slices <= len(indices) <= OPTIONS.max_slices


def test_metadata_names_every_patient_once_with_its_finding(raw_dir):
    header, *lines = (raw_dir / 'metadata.csv').read_text().splitlines()
    assert header == 'patient id,source,country,sex,age,finding,verified finding,slice selection,view,modality'
    findings = {line.split(',')[0]: line.split(',')[5] for line in lines}
    assert len(findings) == len(lines) == 16
    for split in phantom.SPLITS:
        for name, label, _ in read_list(raw_dir, split):
            assert findings[name.rsplit('-', 1)[0]] == ('Normal', 'Pneumonia', 'COVID-19')[label]


def test_images_and_masks_are_grey_png_of_one_size(raw_dir):
    for path in (raw_dir / '2A_images').iterdir():
        with Image.open(path) as image:
            assert (image.mode, image.size) == ('L', (96, 96))
    for path in (raw_dir / 'lesion_masks').iterdir():
        with Image.open(path) as image:
            assert image.size == (96, 96)
            assert np.unique(np.asarray(image)).tolist() == [0, 255]


def test_splits_share_no_patient_and_balance_the_classes(raw_dir):
    patients = {split: {row[0].rsplit('-', 1)[0] for row in read_list(raw_dir, split)} for split in phantom.SPLITS}
    assert len(set.union(*patients.values())) == sum(map(len, patients.values()))
    counts = {}
    for split in phantom.SPLITS:
        labels = {row[0].rsplit('-', 1)[0]: row[1] for row in read_list(raw_dir, split)}
        counts[split] = np.bincount(list(labels.values()), minlength=3).tolist()
    assert counts == {'train': [3, 3, 3], 'val': [2, 1, 1], 'test': [1, 1, 1]}


def test_same_options_give_the_same_bytes_and_are_not_written_twice(raw_dir, tmp_path):
    again = tmp_path / 'again'
    phantom.write_phantoms(again, OPTIONS)
    assert read_bytes(again) == read_bytes(raw_dir)
    made = again.stat().st_mtime_ns
    phantom.write_phantoms(again, OPTIONS)
    assert again.stat().st_mtime_ns == made


def test_streams_differ_by_seed_split_and_patient():
    options = dataclasses.replace(OPTIONS, min_slices=8, max_slices=8)
    base = phantom.render_scan(options, 'train', 3, 0)[0]
    others = [
        phantom.render_scan(dataclasses.replace(options, seed=7), 'train', 3, 0)[0],
        phantom.render_scan(options, 'val', 3, 0)[0],
        phantom.render_scan(options, 'train', 4, 0)[0],
    ]
    assert all(np.mean(base != other) > 0.5 for other in others)


@pytest.mark.parametrize('label', [1, 2])
def test_the_label_changes_the_lesion_and_nothing_else(label):
    for patient in range(6):
        well, no_masks, boxes = phantom.render_scan(OPTIONS, 'val', patient, 0)
        sick, masks, sick_boxes = phantom.render_scan(OPTIONS, 'val', patient, label)
        assert not no_masks.any()
        assert sick.shape == well.shape == masks.shape
        np.testing.assert_array_equal(boxes, sick_boxes)
        lesion_free = ~masks.any((1, 2))
        # The soft edge of a lesion below the mask threshold may change a few pixels.
        assert np.mean(sick[lesion_free] != well[lesion_free]) < 0.001 if lesion_free.any() else True
        changed = np.abs(sick.astype(int) - well) > 12
        assert changed[masks].mean() > 0.75
        assert changed.sum() < 3 * masks.sum()


def test_masks_lie_in_the_body_box(sick_scans):
    for _, _, masks, boxes in sick_scans:
        for mask, (xmin, ymin, xmax, ymax) in zip(masks, boxes, strict=True):
            assert mask.sum() == mask[ymin:ymax, xmin:xmax].sum()


def test_pneumonia_lies_in_one_lung_and_covid_in_both(sick_scans):
    for label, _, masks, boxes in sick_scans:
        columns = np.arange(masks.shape[2])
        middle = ((boxes[:, 0] + boxes[:, 2] - 1) / 2)[:, None]
        area = masks.sum(1)
        left, right = (area * (columns < middle)).sum(), (area * (columns > middle)).sum()
        share = min(left, right) / (left + right)
        # The midline of a rotated body is not a column, so a lesion beside the heart may cross it slightly.
        assert share < 0.1 if label == 1 else share > 0.1


def test_pneumonia_spans_neighbouring_slices(sick_scans):
    for label, _, masks, _ in sick_scans:
        if label == 1:
            shown = np.flatnonzero(masks.any((1, 2)))
            assert shown[-1] - shown[0] + 1 == len(shown)


def test_share_of_lesion_free_slices_is_near_its_target(sick_scans):
    shown = np.concatenate([masks.any((1, 2)) for _, _, masks, _ in sick_scans])
    assert 1 - shown.mean() == pytest.approx(phantom.LESION_FREE_SHARE, abs=0.03)


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    write_patient = phantom._write_patient

    def fail_at_fifth(folder, options, split, patient, label):
        if patient == 5:
            raise RuntimeError('stop here')
        return write_patient(folder, options, split, patient, label)

    monkeypatch.setattr(phantom, '_write_patient', fail_at_fifth)
    with joblib.parallel_config(backend='sequential'), pytest.raises(RuntimeError, match='stop here'):
        phantom.write_phantoms(tmp_path / 'raw', OPTIONS)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed(tmp_path):
    stale = tmp_path / '.raw.partial-99999999'  # above the highest process ID of Linux
    (stale / '2A_images').mkdir(parents=True)
    phantom.write_phantoms(tmp_path / 'raw', dataclasses.replace(OPTIONS, num_train=3))
    assert [path.name for path in tmp_path.iterdir()] == ['raw']


def test_an_existing_folder_of_other_options_is_refused(raw_dir, tmp_path):
    before = read_bytes(raw_dir)
    with pytest.raises(UserError, match='num_train 9 instead of 12') as caught:
        phantom.write_phantoms(raw_dir, dataclasses.replace(OPTIONS, num_train=12))
    assert '\n' not in str(caught.value)
    assert read_bytes(raw_dir) == before
    with pytest.raises(UserError, match='holds no phantoms'):
        phantom.write_phantoms(tmp_path, OPTIONS)
    (tmp_path / 'file').write_text('in the way')
    with pytest.raises(UserError, match='cannot write phantoms'):
        phantom.write_phantoms(tmp_path / 'file' / 'raw', OPTIONS)


@pytest.mark.parametrize(
    'change', [{'seed': -1}, {'num_val': 2}, {'image_size': 8}, {'min_slices': 41}, {'num_train': 9990}]
)
def test_options_out_of_range_are_refused(change):
    with pytest.raises(UserError, match='phantoms: '):
        phantom.PhantomOptions(**change)


def test_thumbnails_do_not_give_the_label_away():
    train_pixels, train_labels = make_thumbnails('train', range(60))
    val_pixels, val_labels = make_thumbnails('val', range(240, 270))
    accuracy = RidgeClassifier(alpha=100.0).fit(train_pixels, train_labels).score(val_pixels, val_labels)
    assert accuracy < 0.70


def test_lungs_hold_the_lesions_and_do_not_depend_on_them(raw_dir):
    for patient in range(3):
        _, none, _, well = phantom.render_outlined_scan(OPTIONS, 'val', patient, 0)
        _, lesions, _, sick = phantom.render_outlined_scan(OPTIONS, 'val', patient, 1)
        assert not none.any()
        np.testing.assert_array_equal(sick, well | lesions)
        assert 0.05 < well.mean((1, 2)).min() <= well.mean((1, 2)).max() < 0.6
    listed = {name for split in phantom.SPLITS for name, _, _ in read_list(raw_dir, split)}
    assert {path.name for path in (raw_dir / 'lung_masks').iterdir()} == listed
    for path in (raw_dir / 'lung_masks').iterdir():
        with Image.open(path) as image:
            assert np.unique(np.asarray(image)).tolist() == [0, 255]
