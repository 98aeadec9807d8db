import numpy as np
from PIL import Image

from covidjax.audit.overlap import find_shared_pictures, measure_listed, measure_prepared
from covidjax.data.lists import Row


def draw(count, seed):
    """Returns smooth random pictures, uint8 [N, 64, 64]."""
    small = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), np.uint8)
    return [np.asarray(Image.fromarray(grey).resize((64, 64), Image.Resampling.BICUBIC)) for grey in small]


def measure(pictures, prefix):
    return measure_prepared((f'{prefix}{i}', grey) for i, grey in enumerate(pictures))


def test_the_same_and_nearly_the_same_pictures_are_named():
    inside, outside = draw(6, 0), draw(6, 1)
    assert find_shared_pictures(measure(inside, 'in'), measure(outside, 'out')) == []
    noise = np.random.default_rng(2).normal(0, 3, (64, 64))
    outside[1] = inside[4]
    outside[3] = (inside[2] * 0.9 + noise).round().clip(0, 255).astype(np.uint8)
    found = find_shared_pictures(measure(inside, 'in'), measure(outside, 'out'))
    assert found[0] == 'out1 = in4'
    assert found[1].startswith('out3 = in2 (difference 0.0')
    assert len(found) == 2


def test_blank_pictures_and_copies_within_one_side_are_no_fault():
    blank = np.full((64, 64), 7, np.uint8)
    inside, outside = [*draw(2, 0), blank], draw(2, 1)
    assert find_shared_pictures(measure(inside * 2, 'in'), measure([*outside, *outside, blank], 'out')) == []


def test_nothing_is_shared_with_nothing():
    assert find_shared_pictures(measure([], 'in'), measure([], 'out')) == []


def test_listed_images_are_measured_as_they_lie_on_disk(tmp_path):
    pictures, rows = draw(3, 0), []
    for i, grey in enumerate(pictures):
        Image.fromarray(grey).save(tmp_path / f'CP_{i}_1_0000.png')
        rows.append(Row(f'CP_{i}_1_0000.png', 1, (0, 0, 9, 9), f'CP_{i}_1', f'CP_{i}', 0))
    (tmp_path / 'CP_2_1_0000.png').write_bytes(b'no image')
    found = measure_listed({'train': rows[:1], 'test': rows[1:]}, tmp_path)
    assert found.names == ['CP_0_1_0000.png (CP_0)', 'CP_1_1_0000.png (CP_1)']
    assert find_shared_pictures(measure(pictures, 'in'), found) == [
        'CP_0_1_0000.png (CP_0) = in0',
        'CP_1_1_0000.png (CP_1) = in1',
    ]
