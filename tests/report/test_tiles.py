import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from covidjax.report import tiles
from covidjax.report.pictures import Example

SVG = '{http://www.w3.org/2000/svg}'
IMAGE = np.full((8, 8), 100, np.uint8)


def parse(picture):
    """Returns the elements of a picture and the pixels of its images."""
    head, data = picture.uri.split(',')
    assert head == 'data:image/svg+xml;base64'
    root = ElementTree.fromstring(base64.b64decode(data))
    images = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(element.get('href').split(',')[1]))))
        for element in root.iter(f'{SVG}image')
    ]
    return root, images


def test_tiles_stand_in_reading_order_below_their_titles():
    pixels = [np.full((8, 8), value, np.uint8) for value in (1, 2, 3)]
    picture = tiles.draw_tiles([Example(f't{i}\n<&', image) for i, image in enumerate(pixels)], 2, 'three')
    root, images = parse(picture)
    assert (picture.alt, picture.width) == ('three', 7.5)
    np.testing.assert_array_equal(images, pixels)
    places = [(float(e.get('x')), float(e.get('y'))) for e in root.iter(f'{SVG}image')]
    assert places[0][1] == places[1][1] < places[2][1]
    assert places[0][0] == places[2][0] < places[1][0]
    assert [e.text for e in root.iter(f'{SVG}text')] == ['t0', '<&', 't1', '<&', 't2', '<&']
    _, _, width, height = map(float, root.get('viewBox').split())
    assert width == 540
    assert places[2][1] + 270 < height + 10


def test_a_map_is_laid_over_its_slice_in_its_colours():
    zero, one = np.zeros((8, 8)), np.ones((8, 8))
    rows = [('a row', [Example('slice', IMAGE), Example('low', IMAGE, zero), Example('high', IMAGE, one)])]
    root, (plain, low, high, bar) = parse(tiles.draw_rows(rows, 'maps', scale='share'))
    np.testing.assert_array_equal(plain, IMAGE)
    np.testing.assert_array_equal(low[0, 0], [70, 70, 71])  # 0.7 * 100 + 0.3 * (0, 0, 4)
    np.testing.assert_array_equal(high[0, 0], [146, 146, 119])  # 0.7 * 100 + 0.3 * (252, 255, 164)
    np.testing.assert_array_equal(bar[[0, -1], 0], [[252, 255, 164], [0, 0, 4]])
    texts = [e.text for e in root.iter(f'{SVG}text')]
    assert texts == ['slice', 'low', 'high', 'a row', '1.0', '0.5', '0.0', 'share']


@pytest.mark.parametrize(('value', 'colour'), [(1.0, 'red'), (-1.0, 'blue')])
def test_a_signed_map_is_red_for_and_blue_against(value, colour):
    rows = [('', [Example('', IMAGE, np.full((8, 8), value), is_signed=True)])]
    _, (image, _) = parse(tiles.draw_rows(rows, 'maps', scale='share'))
    red, _, blue = image[0, 0].astype(int)
    assert (red > blue) == (colour == 'red')
    assert abs(red - blue) > 10


def test_a_mask_is_outlined_along_its_pixels():
    mask = np.zeros((8, 8), bool)
    mask[2:4, 5] = True
    root, _ = parse(tiles.draw_tiles([Example('', IMAGE, mask)], 1, 'one'))
    [path] = root.iter(f'{SVG}path')
    edges = set(re.findall(r'M\d+ \d+[hv]1', path.get('d')))
    assert edges == {'M5 2h1', 'M5 4h1', 'M5 2v1', 'M6 2v1', 'M5 3v1', 'M6 3v1'}
    empty, _ = parse(tiles.draw_tiles([Example('', IMAGE, np.zeros((8, 8), bool))], 1, 'one'))
    assert not list(empty.iter(f'{SVG}path'))


def test_a_box_lies_on_its_slice():
    root, [image] = parse(tiles.draw_box(np.zeros((20, 40), np.uint8), (10, 5, 30, 15), 'box', width=1))
    [frame] = root.iter(f'{SVG}rect')
    assert image.shape == (20, 40)
    assert [float(frame.get(name)) for name in ('x', 'y', 'width', 'height')] == [18, 9, 36, 18]
