import numpy as np
import pytest
from PIL import Image

from covidjax.data import lesions, lists, phantom, preprocess
from covidjax.data.masked import LESION
from covidjax.errors import UserError


def write_folder(folder, rows, columns='image,lesion'):
    folder.mkdir(exist_ok=True)
    (folder / 'slices.csv').write_text('\n'.join([columns, *rows]) + '\n')
    image = np.full((40, 60), 200, np.uint8)
    image[10:30, 10:30] = 20
    mask = np.zeros((40, 60), np.uint8)
    mask[20:30, 20:30] = 1
    Image.fromarray(image).save(folder / 'a.png')
    Image.fromarray(mask).save(folder / 'a_mask.png')
    Image.fromarray(np.zeros_like(mask)).save(folder / 'empty.png')
    return folder


def test_folder_by_hand(tmp_path):
    folder = write_folder(tmp_path, ['a.png,a_mask.png,p1,pneumonia', 'a.png,a_mask.png,,', 'a.png,empty.png,p2,'])
    (folder / 'slices.csv').write_text(
        (folder / 'slices.csv').read_text().replace('image,lesion', 'image,lesion,patient,class')
    )
    first, second = lesions.read_lesion_folder(folder, 20)  # the slice with an empty mask is skipped
    assert (first.patient, first.label) == ('p1', 1)
    assert (second.patient, second.label) == ('a.png', 2)
    assert first.image.shape == (20, 20, 1)
    # Resized from 40 x 60 to 20 x 20 pixels: rows 20..30 become 10..15, columns 20..30 become 6.67..10.
    rows, columns = np.nonzero(first.lesion)
    assert (rows.min(), rows.max()) == (10, 14)
    assert (columns.min(), columns.max()) == (7, 9)
    assert first.lung[5:15, 4:10].all()
    assert not first.lung[:4].any()


@pytest.mark.parametrize(
    ('rows', 'columns', 'word'),
    [
        (['a.png,none.png'], 'image,lesion', 'slices.csv:2: none.png'),
        (['../a.png,a_mask.png'], 'image,lesion', "'../a.png' is not a path inside the folder"),
        ([',a_mask.png'], 'image,lesion', "'' is not a path inside the folder"),
        (['a.png,slices.csv'], 'image,lesion', 'slices.csv: '),
        (['a.png,a_mask.png,ill'], 'image,lesion,class', "class 'ill' is not one of"),
        (['a.png,small.png'], 'image,lesion', 'its image (60, 40)'),
        (['a.png'], 'image,mask', 'missing: lesion'),
        ([], 'image,lesion', 'a row below them'),
    ],
)
def test_bad_folder_is_one_line(tmp_path, rows, columns, word):
    folder = write_folder(tmp_path / 'in', rows, columns)
    Image.new('L', (9, 9)).save(folder / 'small.png')
    Image.new('L', (9, 9)).save(tmp_path / 'a.png')
    with pytest.raises(UserError) as caught:
        lesions.read_lesion_folder(folder, 20)
    assert word in str(caught.value)
    assert '\n' not in str(caught.value)


def test_no_list_says_what_is_needed(tmp_path):
    with pytest.raises(UserError, match=r'--outlines and --config\.data\.outlines need a folder with it'):
        lesions.read_lesion_folder(tmp_path, 20)


def test_phantom_lesions_lie_in_their_lungs(tmp_path):
    raw_dir = tmp_path / 'raw'
    phantom.write_phantoms(raw_dir, phantom.PhantomOptions(num_train=3, num_val=3, num_test=6, image_size=96))
    rows = lists.read_list(str(raw_dir / 'test_COVIDx_CT-2A.txt'))
    slices = lesions.read_phantom_lesions(raw_dir, rows, 64)
    masks = {path.name for path in (raw_dir / 'lesion_masks').iterdir()}
    assert {s.name for s in slices} <= {row.file for row in rows} & masks
    assert len(slices) > 20
    assert {s.label for s in slices} == {1, 2}
    for s in slices:
        assert s.lung is not None
        assert 0.05 < s.lung.mean() < 0.6
        assert (s.lung | ~s.lesion).all()


def test_otsu_by_hand():
    # All thresholds between two clusters tie, so the middle is returned.
    assert preprocess.compute_otsu_threshold(np.array([0.0, 0, 0, 1, 1])) == pytest.approx(0.5, abs=0.01)
    assert preprocess.compute_otsu_threshold(np.full(4, 7.0)) == 7
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(2, 0.5, 3000), rng.normal(8, 0.5, 1000)])
    assert preprocess.compute_otsu_threshold(values) == pytest.approx(5, abs=0.5)
    for low, high in ((0, 256), (3, 90), (100, 102)):
        greys = rng.integers(low, high, 500, dtype=np.uint8)
        assert preprocess.compute_otsu_threshold(greys) == preprocess.compute_otsu_threshold(greys.astype(np.int16))


def test_shared_lesions(real_data):
    slices = lesions.read_lesion_folder(real_data / 'lesions', 64)
    assert len(slices) == 50
    shares = np.array([s.lesion.mean() for s in slices])
    assert shares[0] == pytest.approx(0.355, abs=0.01)  # slices.csv says 0.3552
    assert all(s.lung is not None for s in slices)


def test_phantom_masks_lie_in_the_frame_of_the_slices(tmp_path):
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 20:40] = 255
    for folder in ('lesion_masks', '2A_images'):
        (tmp_path / folder).mkdir()
        Image.fromarray(mask).save(tmp_path / folder / 'b_0001.png')
    box = (20, 10, 60, 30)  # its upper left quarter is lesion
    rows = [lists.Row('a_0001.png', 0, box, 'a', 'a', 1), lists.Row('b_0001.png', 1, box, 'b', 'b', 1)]
    (found,) = lesions.read_phantom_lesions(tmp_path, rows, 8)
    assert (found.name, found.label) == ('b_0001.png', 1)
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = True
    np.testing.assert_array_equal(found.lesion, expected)


def test_outlines_of_training_slices_are_found_by_their_pixels(tmp_path):
    """Row 1 has the pixels of an outlined slice under another name; its mask is cut and resized like the slice."""
    images, folder = tmp_path / 'images', tmp_path / 'outlined'
    images.mkdir()
    folder.mkdir()
    greys = np.random.default_rng(0).integers(0, 256, (3, 20, 16), dtype=np.uint8)
    rows = []
    for number, grey in enumerate(greys):
        Image.fromarray(grey).save(images / f'{number}.png')
        rows.append(lists.Row(f'{number}.png', 2, (4, 2, 12, 18), 'scan', 'patient', number))
    Image.fromarray(greys[1]).save(folder / 'other.bmp')
    mask = np.zeros((20, 16), np.uint8)
    mask[2:10, 4:8] = 1  # the upper left quarter of the box
    Image.fromarray(mask).save(folder / 'mask.png')
    (folder / 'slices.csv').write_text('image,lesion\nother.bmp,mask.png\n')
    found = lesions.match_masks([folder], images, rows, 8, 'body')
    assert list(found) == [1]
    np.testing.assert_array_equal(found[1], np.outer(np.arange(8) < 4, np.arange(8) < 4))
    taught = lesions.TaughtSource([{'image': np.zeros((8, 8, 1), np.uint8), 'label': 2}] * 3, found)
    assert taught[1]['masks'].shape == (8, 8, 1)
    assert [int(record['masks'].sum()) for record in taught] == [0, 16 * LESION, 0]
    with pytest.raises(UserError, match='no training slice has the pixels'):
        lesions.match_masks([folder], images, [rows[0], rows[2]], 8, 'body')
