import numpy as np
import pytest
from PIL import Image

from covidjax.audit import source_checks
from covidjax.audit.dataset import read_dataset
from covidjax.audit.source_checks import Features, check_lone_classes, check_sources, draw_rows, score_sources
from covidjax.data.lists import Row


def make_row(patient, label, source, index=0):
    return Row(f'{patient}_{index:04d}.png', label, (0, 0, 99, 99), patient, patient, index, source)


def draw_slice(rng, grey, radius):
    """Two round lungs of a grey and radius on black: a slice that is cut to the lungs."""
    rows, columns = np.mgrid[:64, :64]
    lungs = np.minimum(np.hypot(rows - 32, columns - 16), np.hypot(rows - 32, columns - 48)) < radius
    return np.where(lungs, rng.normal(grey, 4, (64, 64)).clip(30, 255), 0).astype(np.uint8)


def write_data(folder, sources):
    """Writes 12 patients of each (source, label, grey, radius) in one list; the sources are in metadata.csv."""
    images, rng = folder / '2A_images', np.random.default_rng(0)
    images.mkdir()
    lines, meta = [], ['patient id,source']
    for number, (source, label, grey, radius) in enumerate(sources):
        for patient in range(12):
            name = f'p{number}x{patient}'
            meta.append(f'{name},{source}')
            for i in range(2):
                Image.fromarray(draw_slice(rng, grey, radius)).save(images / f'{name}_{i:04d}.png')
                lines.append(f'{name}_{i:04d}.png {label} 0 0 64 64')
    (folder / 'train_COVIDx_CT-2A.txt').write_text('\n'.join(lines))
    (folder / 'metadata.csv').write_text('\n'.join(meta))
    return read_dataset(folder), {path.name for path in images.iterdir()}


def get_scores(check):
    [table] = check.tables
    return {row[0]: row[1:] for row in table.rows}


@pytest.mark.parametrize(
    ('sources', 'telling', 'blind'),
    [
        # Greys differ, outlines don't; and the other way round.
        ([('A', 0, 80, 11), ('B', 1, 140, 11)], 'mean grey in the lungs', 'silhouette of the lungs'),
        ([('A', 0, 100, 7), ('B', 1, 100, 12)], 'silhouette of the lungs', None),
    ],
)
def test_what_tells_sources_and_so_classes_apart(tmp_path, sources, telling, blind):
    dataset, files = write_data(tmp_path, sources)
    check = check_sources(dataset, files)
    scores = get_scores(check)
    assert scores[telling] == (1, [1, 1], 0.5, 1, 0.5)
    assert scores['32x32 thumbnail'][0] == 1
    assert scores['the source itself'] == (1, [1, 1], 0.5, 1, 0.5)
    if blind:
        assert scores[blind][0] < 0.8
    assert check.verdict == 'look'
    assert 'over 2 sources, chance 50%' in check.reason
    assert 'gives the class with 100% (chance 50%)' in check.reason
    assert check_lone_classes(dataset).reason == (
        'Normal (A) and pneumonia (B) come from one source each: what separates them may be the source.'
    )


def test_sources_that_are_alike(tmp_path):
    dataset, files = write_data(tmp_path, [('A', 0, 100, 11), ('B', 0, 100, 11), ('A', 1, 100, 11), ('B', 1, 100, 11)])
    check = check_sources(dataset, files)
    assert check.verdict == 'ok'
    assert all(scores[0] < 0.7 for name, scores in get_scores(check).items() if name != 'the source itself')
    accuracy, *_, of_class, chance = get_scores(check)['the source itself']
    assert accuracy == 1
    assert of_class <= chance == 0.5  # it gives nothing away
    assert check_lone_classes(dataset).verdict == 'ok'


def test_hand_computed_scores():
    # Sources A (normal), B (normal and COVID-19, mostly the latter); the thumbnail shows the source.
    rows = [make_row(f'a{i}', 0, 'A') for i in range(10)]
    rows += [make_row(f'b{i}', 0 if i < 2 else 2, 'B') for i in range(12)]
    is_b = np.array([[row.source == 'B'] for row in rows], np.float32) * 100
    constant = np.ones((22, 3), np.float32)
    thumbnail, silhouette, grey, source = score_sources(rows, Features(is_b, constant, constant[:, :1]), 2)
    # By the source: 10 of 12 normals, all 10 COVID-19.
    assert thumbnail[1:3] == source[1:3] == (1, [1, 1])
    assert thumbnail[3:] == pytest.approx((0.5, (10 / 12 + 1) / 2, 0.5))
    assert source[3:] == thumbnail[3:]
    assert silhouette.sources == grey.sources == 0.5
    assert silhouette.interval == [0.5, 0.5]  # one source gets all


def test_drawing_and_patients(tmp_path):
    rows = [make_row('p', 0, 'A', i) for i in range(500)] + [make_row('q', 0, 'B', i) for i in range(3)]
    drawn = draw_rows(rows)
    assert [row.source for row in drawn] == ['A'] * 200 + ['B'] * 3
    assert (drawn[0].slice_index, drawn[199].slice_index) == (0, 499)
    # The same patient never trains and tests: greys of the patient tell nothing about the source.
    rng = np.random.default_rng(0)
    rows = [make_row(f'{source}{p}', 0, source, i) for source in 'AB' for p in range(20) for i in range(5)]
    of_patient = np.repeat(rng.normal(size=(40, 50)), 5, axis=0).astype(np.float32) * 100
    assert score_sources(rows, Features(of_patient, of_patient, of_patient[:, :1]), 5)[0].sources < 0.75


def test_what_can_not_be_checked(tmp_path):
    dataset, files = write_data(tmp_path, [('A', 0, 100, 11), ('', 1, 120, 11)])
    assert check_sources(dataset, files).verdict == 'not checked'
    (tmp_path / 'metadata.csv').unlink()
    dataset = read_dataset(tmp_path)
    assert check_lone_classes(dataset).verdict == 'not checked'
    assert check_sources(dataset, files).verdict == 'not checked'


def test_slices_without_lungs_are_counted(tmp_path):
    dataset, files = write_data(tmp_path, [('A', 0, 80, 11), ('B', 1, 140, 11)])
    for name in ('p0x0_0000.png', 'p1x3_0001.png'):
        Image.fromarray(np.full((64, 64), 90, np.uint8)).save(dataset.images / name)
    (dataset.images / 'p1x4_0000.png').write_bytes(b'no image')
    check = check_sources(dataset, files)
    assert check.faults == ['3 slices in which no lungs are found, left out']
    assert '45 slices' in check.tables[0].title
    assert check.name == source_checks.NAME
