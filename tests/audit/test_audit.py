import base64
import json
import re

import numpy as np
import pytest
from PIL import Image

from covidjax.audit import baseline_checks, copies, image_checks, list_checks, metadata_checks, run, version_check
from covidjax.audit.check import Check, find_worst, join_words
from covidjax.audit.dataset import read_dataset
from covidjax.audit.measure import list_files, measure_images
from covidjax.data import published
from covidjax.errors import UserError

METADATA_HEAD = 'patient id,source,country,sex,age,finding,verified finding,slice selection,view,modality'


def write_list(raw_dir, split, lines, version='2A'):
    (raw_dir / f'{split}_COVIDx_CT-{version}.txt').write_text(''.join(f'{line}\n' for line in lines))


def make_scan(scan, label, numbers, box='2 3 40 50'):
    return [f'{scan}_{number:04d}.png {label} {box}' for number in numbers]


def get_check(checks, name):
    return next(check for check in checks if check.name == name)


@pytest.fixture
def three_lists(tmp_path):
    write_list(
        tmp_path,
        'train',
        make_scan('Normal_1_1', 0, range(20)) + make_scan('CP_2_2', 1, range(16)) + make_scan('NCP_3_3', 2, range(15)),
    )
    write_list(tmp_path, 'val', make_scan('Normal_4_4', 0, range(4)) + make_scan('CP_2_9', 1, range(17)))
    write_list(tmp_path, 'test', make_scan('NCP_3_3', 2, (3, 30)))
    return tmp_path


# Reading and missing files


def test_bad_rows_are_findings_and_the_others_are_read(tmp_path):
    lines = make_scan('CP_1_1', 1, range(3))
    write_list(
        tmp_path,
        'train',
        [*lines, lines[1], 'CP_1_1_0007.png 1 5 5 5 9', 'CP_1_1_0008.png 3 0 0 9 9', 'x', '../a_1.png 1 0 0 9 9'],
    )
    dataset = read_dataset(tmp_path)
    assert [row.slice_index for row in dataset.splits['train'].rows] == [0, 1, 2]
    check = list_checks.check_rows(dataset)
    assert check.verdict == 'broken'
    assert check.reason == '5 faults in 8 lines.'
    name = 'train_COVIDx_CT-2A.txt'
    assert check.faults[0] == f"{name}:4: 'CP_1_1_0001.png' is already listed in {name}:2"
    assert check.faults[1] == f'{name}:5: CP_1_1_0007.png: the box 5 5 5 9 is empty'
    assert [fault.split(': ')[0] for fault in check.faults] == [f'{name}:{n}' for n in range(4, 9)]
    assert 'CP_1_1_0007.png' in dataset.bad_files


def test_no_folder_and_no_list_are_one_line_errors(tmp_path):
    for folder in (tmp_path / 'absent', tmp_path):
        with pytest.raises(UserError) as caught:
            run.run_audit(folder, tmp_path / 'out')
        assert '\n' not in str(caught.value)
    assert not (tmp_path / 'out').exists()


def test_workdir_that_cannot_be_made_is_an_error(three_lists):
    (three_lists / 'file').write_text('')
    with pytest.raises(UserError, match='choose another --workdir'):
        run.run_audit(three_lists, three_lists / 'file' / 'out')


@pytest.mark.parametrize('data', [b'', b'\xff\xfe\x00', b'only\nbad\nrows\n'])
def test_a_list_without_a_good_row_is_broken(tmp_path, data):
    (tmp_path / 'val_COVIDx_CT-1.txt').write_bytes(data)
    audit = run.run_audit(tmp_path, tmp_path / 'out')
    assert audit['verdict'] == 'broken'
    assert [check['name'] for check in audit['checks']] == ['lists.rows']


@pytest.mark.parametrize('split', ['train', 'val', 'test'])
def test_any_one_list_is_enough(tmp_path, split):
    write_list(tmp_path, split, make_scan('CP_1_1', 1, range(3)), version='3A')
    audit = run.run_audit(tmp_path, tmp_path / 'out')
    verdicts = {check['name']: check['verdict'] for check in audit['checks']}
    assert verdicts['lists.rows'] == 'ok'
    for name in ('leakage.patients', 'metadata.source', 'baselines.names', 'images.missing', 'baselines.thumbnails'):
        assert verdicts[name] == 'not checked'
    assert audit['splits'] == {split: 3}


def test_metadata_that_cannot_be_read_is_broken(three_lists):
    (three_lists / 'metadata.csv').write_text('patient,source\nCP_2,CNCB\n')
    checks = metadata_checks.check_metadata(read_dataset(three_lists))
    assert checks[0].verdict == 'broken'
    assert "no column 'patient id'" in checks[0].reason
    assert {check.verdict for check in checks[1:]} == {'not checked'}


# Lists


def test_classes_missing_from_lists(three_lists):
    check = list_checks.check_classes(read_dataset(three_lists))
    assert check.verdict == 'broken'
    assert check.faults == [
        'val: no slice of class 2 (covid19)',
        'test: no slice of class 0 (normal)',
        'test: no slice of class 1 (pneumonia)',
    ]


def test_leakage_by_hand(three_lists):
    write_list(three_lists, 'test', make_scan('NCP_3_3', 2, (3, 30)))
    found = {check.name: check.faults for check in list_checks.check_leakage(read_dataset(three_lists))}
    assert found == {
        'leakage.files': ['file NCP_3_3_0003.png: train and test'],
        'leakage.scans': ['scan NCP_3_3: train and test'],
        'leakage.patients': ['patient CP_2: train and val', 'patient NCP_3: train and test'],
    }


def test_labels_by_hand(tmp_path):
    write_list(
        tmp_path, 'train', [*make_scan('CP_1_1', 1, (0, 1)), *make_scan('CP_1_2', 2, (0,)), 'CP_3_1_0000.png 1 0 0 9 9']
    )
    write_list(tmp_path, 'val', ['CP_3_1_0001.png 0 0 0 9 9'])
    scans, patients = list_checks.check_labels(read_dataset(tmp_path))
    assert (scans.verdict, scans.faults) == ('broken', ['scan CP_3_1: normal and pneumonia'])
    assert patients.verdict == 'look'
    assert patients.faults == ['patient CP_1: pneumonia and covid19', 'patient CP_3: normal and pneumonia']


def test_rule_of_16_slices_by_hand(three_lists):
    check = list_checks.check_short(read_dataset(three_lists))
    assert check.verdict == 'look'
    assert '1 of 2 normal (50%), 0 of 2 pneumonia (0%) and 2 of 2 covid19 (100%): 50% of the sick scans' in check.reason
    assert check.tables[0].rows[3:5] == [('val', 'normal', 1, 1, 1.0), ('val', 'pneumonia', 1, 0, 0.0)]


def test_published_counts_are_the_known_totals():
    totals = {name: [sum(counts) for counts in splits] for name, splits in published.SLICES.items()}
    assert totals['CT-1'] == [61782, 21036, 21191]
    assert totals['CT-2A'] == [143778, 25486, 25658]
    assert sum(totals['CT-2B']) == 201103
    assert sum(totals['CT-3A']) == 425024
    assert sum(totals['CT-3B']) == 431205
    assert [sum(counts) for counts in published.SEQUENCES] == [2390, 430, 408]


@pytest.mark.parametrize(
    ('name', 'version', 'verdict', 'word'),
    [
        ('CT-2A', '2A', 'ok', 'those of COVIDx CT-2A.'),
        ('CT-2A first draft', '2A', 'look', 'CT-2A first draft'),
        ('CT-1', '2A', 'look', 'COVIDx CT-1'),
    ],
)
def test_version_by_content(tmp_path, monkeypatch, name, version, verdict, word):
    small = {key: tuple(tuple(n // 50 for n in c) for c in splits) for key, splits in published.SLICES.items()}
    monkeypatch.setattr(version_check, 'SLICES', small)
    for split, counts in zip(('train', 'val', 'test'), small[name], strict=True):
        lines = [line for label, n in enumerate(counts) for line in make_scan(f'{split}{label}', label, range(n))]
        write_list(tmp_path, split, lines, version)
    check = version_check.check_version(read_dataset(tmp_path))
    assert check.verdict == verdict
    assert word in check.reason


def test_metadata_by_hand(tmp_path):
    lines, rows = [], [METADATA_HEAD]
    for i in range(8):
        label = i % 2
        lines += make_scan(f'CP_{i}_1', label, range(2))
        source = 'A' if i < 4 else 'B' if label else ''
        finding = ('Normal', 'Pneumonia')[label] if i else 'COVID-19'
        rows.append(f'CP_{i},{source},,{"MF"[label]},{10 * i},{finding},Yes,Expert,Axial,CT')
    write_list(tmp_path, 'train', lines + make_scan('CP_99_1', 2, (0,)))
    (tmp_path / 'metadata.csv').write_text('\n'.join(rows))
    checks = {check.name: check for check in metadata_checks.check_metadata(read_dataset(tmp_path))}
    assert checks['metadata.patients'].faults == [
        'patient CP_0: normal in the lists, covid19 in metadata.csv',
        'patient CP_99: not in metadata.csv',
    ]
    source = checks['metadata.source']
    assert source.tables[0].rows == [('A', 2, 2, 0, 4, 8), ('not given', 2, 0, 0, 2, 4), ('B', 0, 2, 0, 2, 4)]
    assert source.verdict == 'ok'  # two patients are no pattern
    # Guessing by source is right for 2 of the 4 patients of A and all 4 others.
    assert 'right for 75% of the patients (without it, 50%)' in source.reason
    assert checks['metadata.sex'].faults == ['sex M: 4 patients, all normal', 'sex F: 4 patients, all pneumonia']
    assert checks['metadata.country'].verdict == 'not checked'
    assert [row[0] for row in checks['metadata.age'].tables[0].rows] == ['00-19', '20-39', '40-59', '60-79']


# Baselines


def write_separable(raw_dir, splits, telling):
    rng = np.random.default_rng(0)
    for split in splits:
        lines = []
        for i in range(30):
            label = i % 3
            length = 5 + 10 * label if telling else rng.integers(5, 40)
            lines += make_scan(f'{split}{i}', label, range(length))
        write_list(raw_dir, split, lines)


@pytest.mark.parametrize('splits', [('val',), ('train', 'test')])
def test_names_that_tell_the_class(tmp_path, splits):
    write_separable(tmp_path, splits, telling=True)
    check = baseline_checks.check_names(read_dataset(tmp_path))
    assert check.verdict == 'look'
    slices, scans, *_ = (dict(zip(check.tables[0].columns, row, strict=True)) for row in check.tables[0].rows)
    assert scans['accuracy'] == scans['balanced accuracy'] == 1
    assert scans['interval of accuracy'] == [1, 1]
    assert scans['scored on'] == splits[-1]
    assert (scans['number'], scans['majority class']) == (30, 1 / 3)
    # 450 slices; the majority class has 10 scans of 25 slices.
    assert (slices['number'], slices['majority class']) == (450, 250 / 450)


def test_names_that_tell_nothing(tmp_path):
    write_separable(tmp_path, ('train', 'val', 'test'), telling=False)
    check = baseline_checks.check_names(read_dataset(tmp_path))
    assert check.verdict == 'ok'
    assert {row[2] for row in check.tables[0].rows} == {'val', 'test'}


def test_accuracies_by_hand():
    examples = baseline_checks.Examples(
        np.zeros((3, 1)), np.array([0, 0, 1]), np.array(['a', 'b', 'b']), np.array([4, 1, 5])
    )
    scored = baseline_checks.Scored('train', 'val', examples, np.zeros((3, 3)), 0)
    found = baseline_checks.compute_accuracies(scored, np.array([0, 1, 1]))
    assert found['accuracy'] == 0.9
    assert found['balanced'] == pytest.approx((4 / 5 + 1) / 2)
    # Resamples: {a, a} all correct, {a, b} 9 of 10, {b, b} 5 of 6.
    assert found['accuracy_interval'] == pytest.approx([5 / 6, 1])


# Images


def save_image(folder, name, pixels):
    folder.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(folder / name)


def draw_slice(seed, size=64):
    """Returns a smooth random image, uint8 [size, size]."""
    small = np.random.default_rng(seed).uniform(0, 255, (8, 8)).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC))


def measure(raw_dir):
    dataset = read_dataset(raw_dir)
    places = {r.file: copies.Place(split, r) for split, part in dataset.splits.items() for r in part.rows}
    images = measure_images([place.row for place in places.values()], dataset.images, set())
    return dataset, images, [places[file] for file in images.index]


def test_sizes_depths_and_brightness(tmp_path):
    folder = tmp_path / 'images'
    pixels = {
        0: draw_slice(0),
        1: draw_slice(1, 80),
        2: np.full((64, 64), 130, np.uint8),
        3: np.uint8(draw_slice(3) > 127) * 6,
        4: 255 - draw_slice(4) // 40,
        5: draw_slice(5).astype(np.uint16) * 257,
    }
    for number, image in pixels.items():
        save_image(folder, f'CP_1_1_{number:04d}.png', image)
    (folder / 'CP_1_1_0006.png').write_text('no image')
    write_list(tmp_path, 'train', make_scan('CP_1_1', 1, range(7)))
    _, images, places = measure(tmp_path)
    checks = image_checks.check_images(images, places)
    assert get_check(checks, 'images.readable').faults == ['CP_1_1_0006.png: not an image']
    depths, sizes = get_check(checks, 'images.format').tables
    assert depths.rows == [('8-bit grey', 0, 5, 0), ('16-bit grey', 0, 1, 0)]
    assert sizes.rows == [('64 x 64', 0, 5, 0), ('80 x 80', 0, 1, 0)]
    assert get_check(checks, 'images.format').verdict == 'look'
    faults = get_check(checks, 'images.brightness').faults
    assert [fault.split(',')[0].split(': ') for fault in faults] == [
        ['CP_1_1_0002.png', 'blank'],
        ['CP_1_1_0003.png', 'nearly black'],
        ['CP_1_1_0004.png', 'nearly white'],
    ]
    # 16-bit images are judged after conversion to the 8 bits that the networks see.
    eight = draw_slice(5)
    assert images.ranges[5] == pytest.approx([eight.min(), eight.max(), eight.mean()])


def test_image_of_a_bombs_size_is_refused(tmp_path):
    save_image(tmp_path / 'images', 'CP_1_1_0000.png', np.zeros((8001, 8000), np.uint8))
    write_list(tmp_path, 'train', make_scan('CP_1_1', 1, (0,)))
    _, images, _ = measure(tmp_path)
    assert 'decompression bomb' in images.faults['CP_1_1_0000.png']


def test_boxes_by_hand(tmp_path):
    boxes = ['0 0 64 64', '-2 0 64 64', '10 10 65 60', '64 0 90 50', '0 0 64 15', '0 0 60 16']
    for number in range(6):
        save_image(tmp_path / 'images', f'CP_1_1_{number:04d}.png', draw_slice(number))
    write_list(tmp_path, 'train', [f'CP_1_1_{n:04d}.png 1 {box}' for n, box in enumerate(boxes)])
    dataset, images, _ = measure(tmp_path)
    check = image_checks.check_boxes(dataset, images)
    assert check.verdict == 'broken'
    assert [(int(fault[7:11]), fault.split(', ')[1]) for fault in check.faults] == [
        (3, 'missing the image'),
        (1, 'reaching beyond the image and clipped'),
        (2, 'reaching beyond the image and clipped'),
        (4, 'with a side of less than 16 pixels'),
        (4, 'with sides in a ratio above 4 to 1'),
    ]
    without_images = image_checks.check_boxes(dataset, None)
    assert without_images.verdict == 'look'
    assert len(without_images.faults) == 3  # without image sizes, the upper edges are unknown


def test_identical_pixels_whatever_the_file(tmp_path):
    folder = tmp_path / 'images'
    save_image(folder, 'CP_1_1_0000.png', draw_slice(0))
    Image.fromarray(draw_slice(0)).convert('RGB').save(folder / 'CP_2_1_0000.png', compress_level=1)
    save_image(folder, 'CP_1_1_0001.png', np.zeros((64, 64), np.uint8))
    save_image(folder, 'CP_2_1_0001.png', np.zeros((64, 64), np.uint8))  # blank images are not copies
    write_list(tmp_path, 'train', make_scan('CP_1_1', 1, range(2)) + make_scan('CP_2_1', 1, range(2)))
    _, images, places = measure(tmp_path)
    identical, near = copies.check_copies(images, places)
    assert identical.verdict == 'look'  # within one list
    assert identical.faults == ['CP_1_1_0000.png (train, CP_1) = CP_2_1_0000.png (train, CP_2)']
    assert near.verdict == 'ok'


def test_near_copies_are_found_and_others_are_not():
    rng = np.random.default_rng(0)
    thumbnails = np.stack([np.asarray(Image.fromarray(draw_slice(i)).resize((32, 32))) for i in range(300)])
    brighter = (thumbnails[7] * 0.9 + 12).round().astype(np.uint8)
    noisy = (thumbnails[9] + rng.normal(0, 1, (32, 32))).round().clip(0, 255).astype(np.uint8)
    flat = np.full((32, 32), 7, np.uint8)
    images = np.concatenate([thumbnails, [brighter, noisy, flat, flat]])
    pairs, distances = copies.find_copies(images, np.arange(len(images)))
    assert {tuple(pair) for pair in pairs.tolist()} == {(7, 300), (9, 301)}
    assert (distances < copies.MAX_DISTANCE).all()
    same_scan = np.zeros(len(images), int)
    assert len(copies.find_copies(images, same_scan)[0]) == 0


def test_a_copy_is_not_paired_with_the_neighbours_of_its_original():
    first, last = (draw_slice(i, 32).astype(float) for i in (0, 1))
    scan = [(first * (1 - w) + last * w).round().astype(np.uint8) for w in np.arange(8) * 0.02]
    copy = (scan[3] * 0.8 + 20).round().astype(np.uint8)
    images, groups = np.stack([*scan, copy]), np.array([0] * 8 + [1])
    near = np.array([copies.find_copies(images[[i, 8]], np.array([0, 1]))[0].shape[0] for i in range(8)])
    assert near.sum() > 1  # on its own, a neighbour would be paired too
    assert copies.find_copies(images, groups)[0].tolist() == [[3, 8]]
    # A re-saved scan is paired slice by slice.
    again = np.stack([*scan, *(image // 2 + 30 for image in scan)])
    pairs, _ = copies.find_copies(again, np.repeat([0, 1], 8))
    assert sorted(pairs.tolist()) == [[i, i + 8] for i in range(8)]


def test_candidates_miss_no_pair():
    # Compare with the direct distances of all pairs, on similar images.
    base = draw_slice(1, 32).astype(float)
    rng = np.random.default_rng(1)
    noise = rng.normal(0, 1, (120, 32, 32)) * rng.uniform(0, 6, (120, 1, 1))
    images = (base + noise).round().clip(0, 255).astype(np.uint8)
    # Each image is its own group, so every pair counts.
    normal = images - images.mean((1, 2), keepdims=True)
    normal /= normal.std((1, 2), keepdims=True)
    direct = np.sqrt(((normal[:, None] - normal[None]) ** 2).mean((2, 3)))
    expected = {(i, j) for i, j in zip(*np.nonzero(direct < copies.MAX_DISTANCE), strict=True) if i < j}
    assert 0 < len(expected) < 120 * 119 // 2
    pairs, _ = copies.find_copies(images, np.arange(120))
    assert {tuple(pair) for pair in pairs.tolist()} == expected


def test_files_in_folders_and_hidden_ones(tmp_path):
    (tmp_path / 'a' / 'b').mkdir(parents=True)
    for name in ('x.png', 'a/y.png', 'a/b/z.png', '.hidden', 'a/.DS_Store'):
        (tmp_path / name).write_text('')
    assert list_files(tmp_path) == {'x.png', 'a/y.png', 'a/b/z.png'}


# Reports


def test_worst_verdict():
    def worst(*verdicts):
        return find_worst([Check('a', 'a', verdict, '') for verdict in verdicts])

    assert worst('ok', 'not checked', 'look') == 'look'
    assert worst('broken', 'look') == 'broken'
    assert worst('ok', 'not checked') == 'ok'
    assert worst('not checked') == 'not checked'
    assert join_words(['a', 'b', 'c']) == 'a, b and c'
    assert join_words([]) == ''


def test_page_escapes_text_and_needs_no_other_file(tmp_path):
    write_list(tmp_path, 'train', [*make_scan('CP_<b>&1_1', 1, range(3)), '<script>alert(1)</script> 9'])
    (tmp_path / 'metadata.csv').write_text(f'{METADATA_HEAD}\nCP_<b>&1_1,<img src=x>,,,,Pneumonia,Yes,Expert,Axial,CT')
    run.run_audit(tmp_path, tmp_path / 'out')
    page = (tmp_path / 'out' / 'audit.html').read_text()
    assert '<script' not in page
    assert '<b>' not in page
    assert '<img src=x>' not in page
    assert '&lt;img src=x&gt;' in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(('data:', '#')) for source in sources)
    assert all(re.findall(r'<img [^>]*alt="[^"]+"', page))
    svg = base64.b64decode(next(s for s in sources if s.startswith('data:')).split(',')[1]).decode()
    assert 'currentColor' in svg
    assert 'prefers-color-scheme:dark' in svg
    assert json.loads((tmp_path / 'out' / 'audit.json').read_text())['verdict'] == 'broken'
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'audit.html', 'audit.json'}


# Real data


def test_public_validation_list(real_data, tmp_path):
    audit = run.run_audit(real_data / 'covidx_lists', tmp_path)
    checks = {check['name']: check for check in audit['checks']}
    assert audit['verdict'] == 'look'
    assert checks['lists.version']['verdict'] == 'ok'
    assert [row[2] for row in checks['lists.version']['tables'][0]['rows']] == [11842, 7400, 6244, 25486]
    assert [row[2:] for row in checks['scans.sequences']['tables'][0]['rows']] == [
        [172, 172],
        [112, 112],
        [147, 146],
        [431, 430],
    ]
    assert (
        "where the paper prints 430, because its authors' loop loses the last scan"
        in checks['scans.sequences']['reason']
    )
    assert '682 scans of 482 patients' in checks['scans.lengths']['reason']
    assert checks['metadata.patients']['verdict'] == 'ok'
    assert 'source LIDC-IDRI: 9 patients, all normal' in checks['metadata.source']['faults']
    accuracy = {row[0]: row[6] for row in checks['baselines.names']['tables'][0]['rows']}
    assert 0.65 < accuracy['scans'] < 0.75
    assert 0.67 < accuracy['scans of 16 slices or more'] < 0.77


def test_real_slices_have_a_class_apart(real_data, tmp_path):
    audit = run.run_audit(real_data / 'real_slices', tmp_path)
    checks = {check['name']: check for check in audit['checks']}
    assert audit['verdict'] == 'look'
    assert checks['baselines.thumbnails']['reason'].startswith('normal is separable from pneumonia and covid19')
    assert 'another source or preparation' in checks['baselines.thumbnails']['reason']
    for name in ('images.identical', 'images.near_identical', 'images.readable', 'leakage.patients'):
        assert checks[name]['verdict'] == 'ok'
