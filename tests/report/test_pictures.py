import numpy as np

from covidjax.data.lists import Row
from covidjax.report import pictures
from covidjax.report.pictures import Example


def make_rows(label, patients):
    return [Row(f'{p}-{i}.png', label, (0, 0, 9, 9), p, p, i) for p, count in patients.items() for i in range(count)]


def test_examples_are_middle_slices_of_patients_spread_over_the_list():
    rows = make_rows(0, {'a': 100, 'b': 3, 'c': 5, 'd': 1, 'e': 7}) + make_rows(2, {'f': 4})
    chosen = pictures.choose_examples(rows, 3)
    assert list(chosen) == ['normal', 'covid19']  # there is no pneumonia slice
    assert [rows[i].file for i in chosen['normal']] == ['a-50.png', 'c-2.png', 'e-3.png']
    assert [rows[i].file for i in chosen['covid19']] == ['f-2.png']


def test_panels_stand_side_by_side_in_the_papers_order():
    slices = {
        name: [Example(f'{name} {i}', np.full((8, 8), 10 * i, np.uint8), np.eye(8)) for i in range(3)]
        for name in ('normal', 'pneumonia', 'covid19')
    }
    figure = pictures.render_panels(slices, 2, scale='attention')
    parts = figure.subfigs
    assert [part.get_suptitle() for part in parts[:3]] == ['normal', 'pneumonia', 'covid19']
    shown = [[axes.get_title() for axes in part.axes if axes.images] for part in parts[:3]]
    assert shown[1] == ['pneumonia 0', 'pneumonia 1', 'pneumonia 2']
    assert parts[3].axes[0].get_ylabel() == 'attention'  # the colour bar
    figure.draw_without_rendering()


def test_masks_are_outlined_and_empty_ones_are_not():
    mask = np.zeros((8, 8), bool)
    mask[2:5, 2:5] = True
    for overlay, count in ((mask, 1), (np.zeros((8, 8), bool), 0)):
        figure = pictures.render_panels({'a': [Example('', np.zeros((8, 8), np.uint8), overlay)]}, 1)
        assert len(figure.subfigs[0].axes[0].collections) == count


def test_maps_have_one_heading_per_column():
    line = [Example(name, np.zeros((8, 8), np.uint8)) for name in ('slice', 'map')]
    figure = pictures.render_maps([('first', line), ('second', line)], scale='s')
    assert [axes.get_title() for axes in figure.axes[:4]] == ['slice', 'map', '', '']
    assert [figure.axes[i].get_ylabel() for i in (0, 2)] == ['first', 'second']


def test_a_box_is_outlined_where_it_lies_in_the_image():
    example = pictures.outline_box('raw', np.zeros((6, 8), np.uint8), (-2, 1, 3, 9))  # it reaches beyond the image
    assert example.overlay.shape == (6, 8)
    assert np.argwhere(example.overlay).min(0).tolist() == [1, 0]
    assert np.argwhere(example.overlay).max(0).tolist() == [5, 2]


def test_maps_are_arranged_by_slice():
    images = np.arange(2, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    lines = pictures.arrange_maps(['a', 'b'], images, {'map': np.stack([np.full((4, 4), 0.1), np.full((4, 4), 0.9)])})
    assert [title for title, _ in lines] == ['a', 'b']
    slice_, of_map = lines[1][1]
    assert (slice_.title, slice_.overlay, of_map.title) == ('slice', None, 'map')
    assert (slice_.image == 1).all()
    assert (of_map.image == 1).all()
    assert (of_map.overlay == 0.9).all()


def test_outlines_by_hand():
    grey = np.full((7, 7), 9, np.uint8)
    labels = np.zeros((7, 7), np.uint8)
    labels[1:6, 1:6] = 1
    labels[2:5, 2:5] = 2
    picture = pictures.outline_labels(grey, labels)
    lungs, lesion = pictures.LINE_COLOURS[1], pictures.LINE_COLOURS[2]
    assert picture[3].tolist() == [[9] * 3, [*lungs], [*lesion], [9] * 3, [*lesion], [*lungs], [9] * 3]
    labels[3, 3] = 3
    assert pictures.outline_labels(grey, labels)[3, 3].tolist() == [*pictures.LINE_COLOURS[3]]
    np.testing.assert_array_equal(pictures.outline_labels(grey, labels * 0), grey[..., np.newaxis].repeat(3, -1))
