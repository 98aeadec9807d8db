import csv
import gzip
import json

import nibabel
import numpy as np
import pytest
from PIL import Image

from covidjax.data import masked, phantom
from covidjax.errors import UserError

# ---------------------------------------------------------------------------------------------------------------------
# slices.csv


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def draw(number, height=8, width=8):
    """Returns an image that no other number has."""
    return np.random.default_rng(number).integers(0, 256, (height, width), np.uint8)


def write_list(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (folder / 'slices.csv').open('w', newline='') as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def write_slices(folder, rows):
    """Writes one slice for each row of columns, with a lesion in its upper left quarter."""
    lesion = np.zeros((8, 8), np.uint8)
    lesion[:4, :4] = 255
    save(folder / 'lesion.png', lesion)
    listed = []
    for number, row in enumerate(rows):
        image = f'{number}.png'
        save(folder / image, draw([*folder.name.encode(), number]))
        listed.append({'image': image, 'lesion': 'lesion.png', **row})
    return write_list(folder, listed)


def by_name(data):
    return {row.name: (split, row) for split, rows in data.rows.items() for row in rows}


def masks_of(data, name):
    for split, rows in data.rows.items():
        for index, row in enumerate(rows):
            if row.name == name:
                record = data.sources[split][index]
                assert record['known'] == row.known
                return record['masks'][..., 0]
    raise KeyError(name)


def test_list_by_hand(tmp_path):
    folder = tmp_path / 'own'
    kinds = np.zeros((8, 8), np.uint8)
    kinds[:4, :4], kinds[:2, :4] = 1, 2
    lungs = np.full((8, 8), 255, np.uint8)
    lungs[:, 6:] = 0
    empty = np.zeros((8, 8), np.uint8)
    for name, pixels in {'kinds': kinds, 'lungs': lungs, 'lesion': (kinds > 0) * 255, 'empty': empty}.items():
        save(folder / f'{name}.png', pixels)
    rows = [
        {'image': 'a.png', 'multiclass': 'kinds.png', 'lungs': 'lungs.png', 'patient': 'p', 'source': 's'},
        {'image': 'b.png', 'lesion': 'lesion.png', 'patient': 'p', 'source': 's'},
        {'image': 'c.png', 'lesion': 'empty.png', 'lungs': 'lungs.png', 'patient': 'q', 'source': 's'},
        {'image': 'd.png', 'lungs': 'lungs.png', 'patient': 'r'},
    ]
    for number, row in enumerate(rows):
        save(folder / row['image'], draw(number))
    data = masked.read_masked([write_list(folder, [{'split': 'train'} | row for row in rows[:3]])], 4)
    # Of the two training patients, p has the smaller SHA-256 (148d, q has 8e35).
    assert {split: len(found) for split, found in data.rows.items()} == {'train': 1, 'val': 2, 'test': 0}
    data = masked.read_masked(
        [
            write_list(
                folder, [{'split': split} | row for split, row in zip(['train'] * 3 + ['val'], rows, strict=True)]
            )
        ],
        4,
    )
    train = data.rows['train']
    assert [row.name for row in train] == ['own/a.png', 'own/b.png', 'own/c.png']
    assert [row.patient for row in train] == ['p', 'p', 'q']
    assert [row.volume for row in train] == ['own/p', 'own/p', '']
    assert [row.slice_index for row in train] == [0, 1, 0]
    assert [row.source for row in [*train, *data.rows['val']]] == ['s', 's', 's', 'own']
    assert [row.known for row in [*train, *data.rows['val']]] == [7, 2, 7, 1]
    assert [row.has_lesion for row in train] == [True, True, False]
    assert all(row.spacing_mm is None for row in train)
    # From 8 to 4 pixels: rows 0 and 1 of the upper left quarter become row 0, consolidation; row 1 is ground glass.
    expected = np.array([[7, 7, 1, 0], [3, 3, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    np.testing.assert_array_equal(masks_of(data, 'own/a.png'), expected)
    np.testing.assert_array_equal(masks_of(data, 'own/b.png'), expected & 2)
    np.testing.assert_array_equal(masks_of(data, 'own/c.png'), expected & 1)
    record = data.sources['train'][0]
    assert {name: (value.shape, value.dtype) for name, value in record.items()} == {
        'image': ((4, 4, 1), np.uint8),
        'masks': ((4, 4, 1), np.uint8),
        'known': ((), np.uint8),
    }
    with pytest.raises(IndexError):
        data.sources['train'][3]


def test_a_pixel_needs_half_of_the_mask(tmp_path):
    lesion = np.zeros((8, 8), np.uint8)
    lesion[0, 0] = lesion[0, 1] = lesion[4, 4] = 1  # half of the pixel (0, 0) of 4 x 4, a quarter of (2, 2)
    save(tmp_path / 'lesion.png', lesion)
    save(tmp_path / 'a.png', draw(0))
    data = masked.read_masked([write_list(tmp_path, [{'image': 'a.png', 'lesion': 'lesion.png'}])], 4)
    rows, columns = np.nonzero(data.sources['train'][0]['masks'][..., 0])
    assert (rows.tolist(), columns.tolist()) == ([0], [0])


def test_wide_slices_are_resized_whole(tmp_path):
    lesion = np.zeros((10, 20), np.uint8)
    lesion[:, 10:] = 255
    save(tmp_path / 'lesion.png', lesion)
    save(tmp_path / 'a.png', lesion // 2)
    data = masked.read_masked([write_list(tmp_path, [{'image': 'a.png', 'lesion': 'lesion.png'}])], 10)
    record = data.sources['train'][0]
    np.testing.assert_array_equal(record['masks'][..., 0] > 0, np.arange(10)[None] * np.ones((10, 1)) >= 5)
    assert record['image'][:, 0].max() < 10
    assert record['image'][:, -1].min() > 110


def test_a_fifth_of_the_training_patients_becomes_validation(tmp_path):
    rows = [{'split': 'test' if i >= 20 else 'train', 'patient': f'p{i // 2}'} for i in range(24)]
    data = masked.read_masked([write_slices(tmp_path / 'a', rows)], 8)
    patients = {split: sorted({row.patient for row in found}) for split, found in data.rows.items()}
    assert {split: len(found) for split, found in patients.items()} == {'train': 8, 'val': 2, 'test': 2}
    assert patients['test'] == ['p10', 'p11']
    # SHA-256 of p7 begins with 03fb, of p0 with 169b, of all others of p0 to p9 with 2614 or more.
    assert patients['val'] == ['p0', 'p7']


def test_split_without_any(tmp_path):
    data = masked.read_masked([write_slices(tmp_path / 'a', [{}] * 10)], 8)
    assert {split: len(rows) for split, rows in data.rows.items()} == {'train': 6, 'val': 2, 'test': 2}
    assert all(row.patient == row.name and row.volume == '' for rows in data.rows.values() for row in rows)
    again = masked.read_masked([tmp_path / 'a'], 8)
    assert again.rows == data.rows
    assert again.fingerprint == data.fingerprint
    save(tmp_path / 'a' / '3.png', draw(99))
    assert masked.read_masked([tmp_path / 'a'], 8).fingerprint != data.fingerprint
    assert masked.read_masked([tmp_path / 'a'], 4).fingerprint != data.fingerprint


def test_sources_are_chosen_by_name(tmp_path):
    rows = [{'source': source, 'patient': f'{source}{i}'} for source in ('x', 'y') for i in range(5)]
    folders = [write_slices(tmp_path / 'a', rows), write_slices(tmp_path / 'b', [{}] * 5)]
    whole = masked.read_masked(folders, 8)
    assert {row.source for _, row in by_name(whole).values()} == {'x', 'y', 'b'}
    chosen = masked.read_masked(folders, 8, ['y', 'b'])
    # The split of a source does not depend on the others.
    assert by_name(chosen) == {name: found for name, found in by_name(whole).items() if found[1].source != 'x'}
    assert masked.read_masked(folders, 8, ['']).fingerprint == whole.fingerprint
    with pytest.raises(UserError, match='no source z: the folders have b, x, y'):
        masked.read_masked(folders, 8, ['z'])


def test_folders_of_one_name_are_told_apart(tmp_path):
    folders = [write_slices(tmp_path / one / 'slices', [{'patient': f'{one}{i}'} for i in range(3)]) for one in 'ab']
    for i in range(3):
        save(folders[1] / f'{i}.png', draw([7, i]))
    names = by_name(masked.read_masked(folders, 8))
    assert {name.rsplit('/', 1)[0] for name in names} == {'a/slices', 'b/slices'}
    assert len(names) == 6
    with pytest.raises(UserError, match='is named twice'):
        masked.read_masked([folders[0], folders[0] / '..' / 'slices'], 8)


@pytest.mark.parametrize(
    ('row', 'word'),
    [
        ({'lesion': 'none.png'}, 'in/slices.csv:3: none.png: No such file'),
        ({'image': 'slices.csv'}, 'slices.csv:3: slices.csv: not an image'),
        ({'image': 'cut.png'}, 'slices.csv:3: cut.png: '),
        ({'lesion': 'small.png'}, 'small.png: a mask of 9 x 5 pixels, its slice has 8 x 8'),
        ({'lesion': 'grey.png'}, 'grey.png: a mask with the values 0, 1, 2, 3, 4, 5, ...; save it with 0, 1 or 0, 255'),
        ({'multiclass': 'lesion.png'}, 'lesion.png: a mask with the values 0, 255; save it with 0, 1, 2'),
        ({'lesion': 'colour.png'}, 'a mask in colour (RGB)'),
        ({'lesion': ''}, 'slices.csv:3: 1.png has no mask'),
        ({'image': ''}, "slices.csv:3: '' is not a path inside the folder"),
        ({'image': '../a.png'}, "'../a.png' is not a path inside the folder"),
        ({'image': '0.png'}, 'slices.csv:3: 0.png is already listed in line 2'),
        ({'split': 'dev'}, "slices.csv:3: the split 'dev' is not one of train, val, test"),
        (
            {'patient': 'p0', 'split': 'test'},
            'patients in two splits, move or rename them: p0 (train of in, test of in)',
        ),
        ({'image': 'copy.png', 'split': 'test'}, 'in/copy.png in test has the pixels of in/0.png in train'),
    ],
)
def test_bad_list_is_one_line(tmp_path, row, word):
    folder = tmp_path / 'in'
    rows = [{'split': 'train', 'patient': 'p0'}, {'split': 'train', 'patient': 'p1', 'multiclass': '', **row}]
    write_slices(folder, rows)
    save(folder / '1.png', draw(1))
    save(folder / 'copy.png', np.asarray(Image.open(folder / '0.png')))
    save(tmp_path / 'a.png', draw(2))
    save(folder / 'small.png', np.zeros((5, 9)))
    save(folder / 'grey.png', np.arange(64).reshape(8, 8))
    save(folder / 'colour.png', np.zeros((8, 8, 3)))
    (folder / 'cut.png').write_bytes((folder / '0.png').read_bytes()[:60])
    with pytest.raises(UserError) as caught:
        masked.read_masked([folder], 8)
    assert word in str(caught.value)
    assert '\n' not in str(caught.value)


def test_all_faults_are_counted(tmp_path):
    folder = write_slices(tmp_path / 'in', [{'lesion': 'none.png'}] * 30)
    with pytest.raises(UserError, match=r'slices.csv:21: .* \(30 in all, the first 20 shown\)'):
        masked.read_masked([folder], 8)


def test_workers_give_the_same(tmp_path, monkeypatch):
    folder = write_slices(tmp_path / 'in', [{}] * 10)
    alone = masked.read_masked([folder], 8)
    monkeypatch.setattr(masked, '_MIN_PARALLEL', 1)
    together = masked.read_masked([folder], 8)
    assert (together.rows, together.fingerprint) == (alone.rows, alone.fingerprint)
    (folder / '3.png').write_bytes(b'')
    with pytest.raises(UserError, match=r'in/slices\.csv:5: 3\.png: not an image'):
        masked.read_masked([folder], 8)


def test_equal_slices_within_one_side_are_fine(tmp_path):
    rows = [{'split': split, 'patient': f'p{i}'} for i, split in enumerate(['train', 'train', 'val', 'test', 'test'])]
    folder = write_slices(tmp_path / 'in', rows)
    for i in range(3):
        save(folder / f'{i}.png', draw(1))
    save(folder / '4.png', draw(3))
    save(folder / '3.png', draw(3))
    assert len(by_name(masked.read_masked([folder], 8))) == 5
    for i in range(5):  # slices of one grey are no copies
        save(folder / f'{i}.png', np.full((8, 8), 7))
    assert len(by_name(masked.read_masked([folder], 8))) == 5


def test_a_patient_in_two_folders(tmp_path):
    folders = [write_slices(tmp_path / split, [{'split': split, 'patient': 'p'}] * 2) for split in ('train', 'test')]
    with pytest.raises(UserError, match=r'p \(train of train, test of test\)'):
        masked.read_masked(folders, 8)
    # A finished model is tested on all of it.
    assert len(by_name(masked.read_masked(folders, 8, for_training=False))) == 4


@pytest.mark.parametrize(
    ('text', 'word'),
    [
        ('image,lesion\n', 'slices.csv has no row'),
        ('', 'slices.csv has no row'),
        ('image,mask\na.png,b.png\n', 'needs the column image and at least one of lesion, multiclass, lungs'),
        ('picture,lesion\na.png,b.png\n', 'needs the column image'),
        (b'image,lesion\n\xff\xfe,\n', 'is not a CSV file in UTF-8'),
    ],
)
def test_bad_tables(tmp_path, text, word):
    (tmp_path / 'slices.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=word):
        masked.read_masked([tmp_path], 8)


def test_bad_folders(tmp_path):
    with pytest.raises(UserError, match='no folder of outlined slices'):
        masked.read_masked([], 8)
    with pytest.raises(UserError, match='none cannot be read'):
        masked.read_masked([tmp_path / 'none'], 8)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match='empty is empty: name a folder of outlined slices'):
        masked.read_masked([tmp_path / 'empty'], 8)
    (tmp_path / 'empty' / 'a.txt').touch()
    with pytest.raises(UserError, match=r'empty holds no outlined slices: it needs slices\.csv, NIfTI'):
        masked.read_masked([tmp_path / 'empty'], 8)
    folder = write_slices(tmp_path / 'two', [{}] * 3)
    (folder / 'train_COVIDx_CT-2A.txt').touch()
    with pytest.raises(UserError, match=r'two holds slices\.csv and COVIDx CT lists in one folder'):
        masked.read_masked([folder], 8)


def test_training_needs_a_lesion_mask(tmp_path):
    save(tmp_path / 'lungs.png', np.full((8, 8), 1))
    save(tmp_path / 'a.png', draw(0))
    folder = write_list(tmp_path, [{'image': 'a.png', 'lungs': 'lungs.png'}])
    with pytest.raises(UserError, match='no slice for training has a lesion mask'):
        masked.read_masked([folder], 8)
    assert masked.read_masked([folder], 8, for_training=False).rows['train'][0].known == masked.LUNGS


# ---------------------------------------------------------------------------------------------------------------------
# Raw directories


def write_raw(folder, rows, metadata=''):
    for split in ('train', 'val', 'test'):
        lines = [f'{file} {label} 0 0 4 4' for one, file, label in rows if one == split]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f'{split}_COVIDx_CT-2A.txt').write_text('\n'.join(lines) + '\n')
    for number, (_, file, label) in enumerate(rows):
        if label == 0:  # the images of the others are not read
            save(folder / '2A_images' / file, draw([label, number]))
    if metadata:
        (folder / 'metadata.csv').write_text(metadata)
    return folder


RAW_ROWS = [
    ('train', 'Normal_1_1_0003.png', 0),
    ('train', 'Normal_1_1_0004.png', 0),
    ('train', 'CP_1_1_0000.png', 1),
    ('val', 'LIDC-IDRI-0001-7-0000.png', 0),
    ('test', 'NCP_1_1_0000.png', 2),
    ('test', 'Normal_2_1_0000.png', 0),
]


def test_raw_directory(tmp_path):
    folder = write_raw(tmp_path / 'raw', RAW_ROWS, 'patient id,source\nNormal_1,CNCB\nLIDC-IDRI-0001,LIDC\n')
    data = masked.read_masked([folder], 8)
    assert [(split, row) for split, rows in data.rows.items() for row in rows] == [
        ('train', masked.MaskedRow('raw/Normal_1_1_0003.png', 'Normal_1', 'CNCB', 'raw/Normal_1_1', 3, None, 6, False)),
        ('train', masked.MaskedRow('raw/Normal_1_1_0004.png', 'Normal_1', 'CNCB', 'raw/Normal_1_1', 4, None, 6, False)),
        ('val', masked.MaskedRow('raw/LIDC-IDRI-0001-7-0000.png', 'LIDC-IDRI-0001', 'LIDC', '', 0, None, 6, False)),
        ('test', masked.MaskedRow('raw/Normal_2_1_0000.png', 'Normal_2', 'raw', '', 0, None, 6, False)),
    ]
    record = data.sources['train'][1]
    np.testing.assert_array_equal(record['image'][..., 0], draw([0, 1]))  # whole, not the box
    assert not record['masks'].any()


def test_bad_raw_directories(tmp_path):
    folder = write_raw(tmp_path / 'sick', [row for row in RAW_ROWS if row[2]])
    (folder / 'val_COVIDx_CT-2A.txt').write_text('NCP_2_1_0000.png 2 0 0 4 4\n')
    with pytest.raises(UserError, match='sick lists no slice of class 0'):
        masked.read_masked([folder], 8)
    (folder / 'val_COVIDx_CT-2A.txt').unlink()
    with pytest.raises(UserError, match=r'val_COVIDx_CT-2A\.txt: the list is missing'):
        masked.read_masked([folder], 8)
    folder = write_raw(tmp_path / 'raw', RAW_ROWS)
    (folder / '2A_images' / 'Normal_2_1_0000.png').unlink()
    with pytest.raises(UserError, match=r'raw/Normal_2_1_0000\.png: No such file'):
        masked.read_masked([folder], 8)


# ---------------------------------------------------------------------------------------------------------------------
# Phantoms


def test_phantoms(tmp_path):
    folder = tmp_path / 'raw'
    options = phantom.PhantomOptions(num_train=3, num_val=3, num_test=3, image_size=64, max_slices=8)
    phantom.write_phantoms(folder, options)
    data = masked.read_masked([folder], 64)
    assert all(row.known == 7 and row.source == 'phantom' for rows in data.rows.values() for row in rows)
    for split, first in (('train', 0), ('val', 3), ('test', 6)):
        scans = [phantom.render_outlined_scan(options, split, first + label, label) for label in range(3)]
        images, lesions, lungs = (np.concatenate([scan[part] for scan in scans]) for part in (0, 1, 3))
        is_pneumonia = np.repeat(np.arange(3) == 1, [len(scan[0]) for scan in scans])
        records = [data.sources[split][i] for i in range(len(data.sources[split]))]
        np.testing.assert_array_equal(np.stack([record['image'][..., 0] for record in records]), images)
        codes = lungs + 2 * lesions + 4 * (lesions & is_pneumonia[:, None, None])
        np.testing.assert_array_equal(np.stack([record['masks'][..., 0] for record in records]), codes)
        assert (lungs >= lesions).all()
        assert 0.1 < lungs.mean() < 0.6
    volumes = {row.volume for row in data.rows['train']}
    assert volumes == {f'raw/phantom1-0-{patient:04d}' for patient in range(3)}


def test_phantoms_without_lungs_are_refused(tmp_path):
    folder = write_raw(tmp_path / 'raw', RAW_ROWS)
    (folder / 'phantoms.json').write_text(json.dumps({}))
    (folder / 'lesion_masks').mkdir()
    with pytest.raises(UserError, match=r'phantoms of an earlier version, without lung_masks/: delete that folder'):
        masked.read_masked([folder], 8)


# ---------------------------------------------------------------------------------------------------------------------
# NIfTI. Arrays are [T, H, W] from head to feet; the affine LPI of nibabel's transpose puts columns to the left, rows to
# the back and slices to the feet.

SPACING_MM = (2.0, 1.0, 5.0)  # rows, columns, slices
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -2.0, 0, 40], [0, 0, -5.0, 50], [0, 0, 0, 1]])
MOVED = AFFINE + np.outer((1, 0, 0, 0), (0, 0, 0, 3))  # three voxels to the right


def draw_scan(number, num_slices=4):
    """Returns int16 Hounsfield units [T, 8, 16] of air around tissue."""
    hu = np.full((num_slices, 8, 16), -1000, np.int16)
    hu[:, 2:6, 4:12] = 40 + np.arange(num_slices)[:, None, None] + 10 * number
    hu[:, 3, 5] = -600
    return hu


def write_nifti(path, array_TxHxW, affine=AFFINE, axcodes=None, dtype=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = np.asarray(array_TxHxW).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(voxels.astype(dtype or voxels.dtype), affine)
    if axcodes:
        start = nibabel.orientations.io_orientation(affine)
        turn = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(axcodes))
        image = image.as_reoriented(turn)
    nibabel.save(image, path)


def write_case(folder, case, number=0, lungs=True, lesions=1, **kwargs):
    hu = draw_scan(number)
    write_nifti(folder / f'{case}.nii.gz', hu, **kwargs)
    if lungs:
        write_nifti(folder / f'{case}_lungs.nii.gz', (hu > -900).astype(np.uint8), **kwargs)
    if lesions:
        mask = np.zeros(hu.shape, np.uint8)
        mask[1, 2:4, 4:8] = 1
        mask[1, 3, 4:8] = lesions
        write_nifti(folder / f'{case}_lesions.nii.gz', mask, **kwargs)
    return hu


def write_volumes(folder):
    """Writes six cases; returns their Hounsfield units. The split is that of the SHA-256 of the names."""
    return {case: write_case(folder, case, number) for number, case in enumerate('abcdef')}


def test_volumes(tmp_path):
    folder = tmp_path / 'nifti'
    scans = write_volumes(folder)
    write_case(folder, 'f', 5, lesions=2)
    data = masked.read_masked([folder], 8)
    assert {split: len(rows) for split, rows in data.rows.items()} == {'train': 16, 'val': 4, 'test': 4}
    names = by_name(data)
    assert len(names) == 24
    for case, hu in scans.items():
        for place in range(4):
            split, row = names[f'nifti/{case}_{place:04d}']
            assert (row.patient, row.volume, row.source, row.slice_index) == (case, f'nifti/{case}', 'nifti', place)
            # 8 x 16 pixels become 8 x 8: columns are twice as wide.
            assert row.spacing_mm == (2.0, 2.0, 5.0)
            assert row.has_lesion == (place == 1)
            assert row.known == (3 if place == 1 and case != 'f' else 7)
            record = data.sources[split][data.rows[split].index(row)]
            expected = np.zeros((8, 8), np.uint8)
            expected[2:6, 2:6] = 1
            if place == 1:
                expected[2:4, 2:4] = 3
                expected[3, 2:4] = 7 if case == 'f' else 3
            np.testing.assert_array_equal(record['masks'][..., 0], expected)
            # The window -1350..150 maps 40 HU to 1390 / 1500 of 255.
            tissue = round((hu[place, 4, 8] + 1350) / 1500 * 255)
            assert abs(int(record['image'][4, 4, 0]) - tissue) < 8


@pytest.mark.parametrize('axcodes', ['RAS', 'LPS', 'LAI', 'PIR', 'SRA'])
def test_volumes_are_turned_by_their_header(tmp_path, axcodes):
    for number, case in enumerate('abc'):
        write_case(tmp_path / 'one' / 'x', case, number, lesions=2)
        write_case(tmp_path / 'two' / 'x', case, number, lesions=2, axcodes=axcodes)
    one, two = (masked.read_masked([tmp_path / name / 'x'], 16) for name in ('one', 'two'))
    assert one.rows == two.rows
    assert one.fingerprint == two.fingerprint


def test_volumes_of_8_bits_are_taken_as_they_are(tmp_path):
    for number, case in enumerate('abc'):
        write_case(tmp_path, case, number)
        grey = np.random.default_rng(number).integers(0, 256, (4, 8, 16))
        write_nifti(tmp_path / f'{case}.nii.gz', grey, dtype=[np.uint8, np.int16, np.float32][number])
        if case == 'a':
            first = grey
    data = masked.read_masked([tmp_path], 16)
    split, row = by_name(data)[f'{tmp_path.name}/a_0000']
    image = data.sources[split][data.rows[split].index(row)]['image'][..., 0]
    expected = np.asarray(Image.fromarray(first[0].astype(np.uint8)).resize((16, 16), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(image, expected)


def test_volumes_with_one_mask(tmp_path):
    for number, case in enumerate('abc'):
        write_case(tmp_path, case, number, lungs=False)
    data = masked.read_masked([tmp_path], 8)
    assert {row.known for rows in data.rows.values() for row in rows} == {2, 6}
    for case in 'abc':
        (tmp_path / f'{case}_lesions.nii.gz').unlink()
        write_nifti(tmp_path / f'{case}_lungs.nii.gz', np.ones((4, 8, 16), np.uint8) * 2)
    with pytest.raises(UserError, match='no slice for training has a lesion mask'):
        masked.read_masked([tmp_path], 8)
    other = write_slices(tmp_path / 'other', [{}] * 3)
    data = masked.read_masked([tmp_path, other], 8)
    assert {row.known for _, row in by_name(data).values() if row.volume} == {1}


@pytest.mark.parametrize(
    ('change', 'word'),
    [
        (lambda f: write_nifti(f / 'a_lungs.nii.gz', np.zeros((3, 8, 16), np.uint8)), 'a mask of 16 x 8 x 3 voxels'),
        (
            lambda f: write_nifti(f / 'a_lesions.nii.gz', np.zeros((4, 8, 16), np.uint8), MOVED),
            'a_lesions.nii.gz: its header puts the mask 3.0 voxels away from its scan',
        ),
        (
            lambda f: write_nifti(f / 'a_lesions.nii.gz', np.full((4, 8, 16), 3, np.uint8)),
            'a_lesions.nii.gz: a mask with the values 3; save it with 0, 1, 2',
        ),
        (
            lambda f: write_nifti(f / 'a_lungs.nii.gz', np.full((4, 8, 16), 0.5, np.float32)),
            'a_lungs.nii.gz: a mask with the values 0.5',
        ),
        (lambda f: write_nifti(f / 'a.nii.gz', draw_scan(0) * 30), 'a.nii.gz: values from'),
        (lambda f: (f / 'a.nii.gz').write_bytes((f / 'a.nii.gz').read_bytes()[:200]), 'a.nii.gz: a damaged'),
        (lambda f: (f / 'a_lungs.nii.gz').write_bytes(gzip.compress(b'no')), 'a_lungs.nii.gz: a damaged'),
        (lambda f: (f / 'a.nii.gz').unlink(), 'a_lesions.nii.gz: its scan a.nii.gz is missing'),
        (
            lambda f: [(f / f'a_{kind}.nii.gz').unlink() for kind in ('lungs', 'lesions')],
            'a.nii.gz: a_lungs.nii.gz and a_lesions.nii.gz are missing',
        ),
        (lambda f: write_nifti(f / 'a.nii', draw_scan(0)), 'are one case: keep one of them'),
    ],
)
def test_bad_volumes(tmp_path, change, word):
    for number, case in enumerate('abc'):
        write_case(tmp_path, case, number)
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        masked.read_masked([tmp_path], 8)
    assert word in str(caught.value)
    assert '\n' not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Real data


def test_shared_data(real_data):
    folders = [real_data / 'lesions', real_data / 'hospitals' / 'lesions', real_data / 'hospitals']
    data = masked.read_masked(folders, 64)
    counts = {}
    for split, rows in data.rows.items():
        for row in rows:
            folder = row.name.split('/slices/')[0].removesuffix('/' + row.name.rsplit('/', 1)[-1])
            counts[folder, split] = counts.get((folder, split), 0) + 1
    assert counts == {
        ('data/lesions', 'train'): 40,  # ten of the fifty become validation
        ('data/lesions', 'val'): 10,
        ('hospitals/lesions', 'train'): 202,
        ('hospitals/lesions', 'val'): 51,
        ('hospitals/lesions', 'test'): 75,
        ('hospitals', 'train'): 217,
        ('hospitals', 'val'): 41,
        ('hospitals', 'test'): 45,
    }
    known = {row.source: set() for rows in data.rows.values() for row in rows}
    for rows in data.rows.values():
        for row in rows:
            known[row.source].add(row.known)
    assert known == {'lesions': {6}, 'coronacases': {3}, 'Radiopaedia': {3, 7}, 'MosMedData': {6}, 'LIDC-IDRI': {6}}
    assert {row.volume for row in data.rows['test'] if row.source == 'coronacases'} == {
        f'hospitals/lesions/NCP_{number}' for number in (7004, 7005)
    }
    # The first row of lesions/slices.csv says that .3552 of its pixels are lesion, .2744 consolidation.
    split, row = by_name(data)['data/lesions/slices/0_img.png']
    masks = data.sources[split][data.rows[split].index(row)]['masks']
    assert np.mean(masks & masked.LESION > 0) == pytest.approx(0.3552, abs=0.005)
    assert np.mean(masks & masked.CONSOLIDATION > 0) == pytest.approx(0.2744, abs=0.005)
