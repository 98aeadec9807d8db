import numpy as np
import pytest

from covidjax.data.preprocess import apply_window
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from tests.faults.hospital_exports import create_faults, list_exports, render, try_export, write_export
from tests.scan_files import make_chest, write_series

SINGLE = {fault.name: fault for fault in create_faults()}
SEPARABLE = ('two phases', 'two kernels in one series')


@pytest.mark.parametrize('name', SINGLE)
def test_every_fault_alone_is_read_whole_or_named(name):
    is_readable = not SINGLE[name].words or name in SEPARABLE
    outcome, message = try_export([SINGLE[name]])
    assert outcome in (('read',) if is_readable else ('doubted', 'refused')), message


def test_pairs_of_faults():
    pairs = [faults for faults in list_exports(0.08) if len(faults) == 2 and '0.6' not in f'{faults}']
    assert len(pairs) > 60
    outcomes = {' + '.join(fault.name for fault in faults): try_export(faults) for faults in pairs}
    assert {names: outcome for names, outcome in outcomes.items() if outcome[0].startswith('LOST')} == {}


def write(tmp_path, *names):
    return write_export(tmp_path, [SINGLE[name] for name in names])[0]


def test_what_is_left_out_is_counted_by_reason(tmp_path):
    volume = read_volume(write(tmp_path, 'one file twice', 'mixed folder'))
    expected = {'copies': 1, 'localizers (scouts)': 1, 'secondary captures': 1, 'not CT': 1, 'not DICOM': 1}
    assert volume.left_out == expected | {'images, NIfTI, MetaImage and NRRD': 1}
    assert dict(volume.facts)['left out'].startswith('1 ')
    assert volume.doubts == []


def test_more_than_a_tenth_left_out_is_a_doubt(tmp_path):
    hu = make_chest()
    folder = write_series(tmp_path / 'scan', hu)
    for number, file in enumerate(sorted(folder.iterdir())[:3]):
        (folder / f'copy{number}').write_bytes(file.read_bytes())
        volume = read_volume(folder)
        assert volume.left_out == {'copies': number + 1}
        assert bool(volume.doubts) == ((number + 1) / (number + 21) > 0.1)
    assert volume.doubts == ['3 of 23 slices of this scan were left out (3 copies)']


def test_equal_pixels_elsewhere_are_no_copies(tmp_path):
    hu = make_chest()
    hu[4:9] = hu[4]
    volume = read_volume(write_series(tmp_path / 'scan', hu, SOPInstanceUID='1.2.3'))
    np.testing.assert_array_equal(volume.slices, apply_window(hu))
    assert volume.left_out == {}


def test_kernels_and_phases_are_both_offered(tmp_path):
    for number, (name, word) in enumerate((('two kernels in one series', 'kernel B70f'), ('two phases', '20 slices'))):
        path = write(tmp_path / str(number), name)
        facts = dict(read_volume(path).facts)
        assert facts['series'].startswith('series 4a: 20 slices')
        assert 'series 4b: ' in facts['other series']
        assert word in facts['other series']
        assert len(read_volume(path, '4b').slices) == 20


def test_what_can_not_be_told_apart_is_described(tmp_path):
    with pytest.raises(
        UserError, match=r'at 20 of 20 places: 20 slices of .*instances 1 to 20; 20 slices of '
    ) as caught:
        read_volume(write(tmp_path, 'two phases, not named'))
    assert 'files IM0000.dcm' in str(caught.value)


def test_the_index_of_a_medium_stands_for_its_folder(tmp_path):
    path = write(tmp_path, 'DICOMDIR')
    np.testing.assert_array_equal(read_volume(path / 'DICOMDIR').slices, apply_window(render(5.0, 2)))


def test_archives_two_levels_deep_are_counted(tmp_path):
    path = write(tmp_path, 'zips in a folder', 'zip')
    assert len(read_volume(path).slices) == 20
    (tmp_path / 'outer').mkdir()
    path.rename(tmp_path / 'outer' / 'export.zip')
    with pytest.raises(UserError, match='2 zip archives in an archive'):
        read_volume(tmp_path / 'outer')


def test_thin_slices_of_several_series_stay_apart(tmp_path):
    hu = make_chest()
    folder = write_series(tmp_path / 'scan', hu)
    below = -100 - 5.0 * np.arange(20)
    write_series(folder / 'next', hu, series='1.2.3.5', number=5, heights=below)  # goes on where the first ends
    between = -2.5 - 5.0 * np.arange(20)
    write_series(folder / 'between', hu, series='1.2.3.6', number=6, heights=between)
    facts = dict(read_volume(folder).facts)
    assert facts['series'].startswith('series 4: 20 slices')
    assert facts['other series'].count('20 slices') == 2


def test_single_slices_that_fit_nowhere_are_counted(tmp_path):
    folder = write_series(tmp_path / 'scan', make_chest())
    write_series(folder / 'monitoring', make_chest()[:1], series='1.2.3.5', number=5, heights=[-1000.0])
    volume = read_volume(folder)
    assert len(volume.slices) == 20
    assert volume.left_out == {'single slices': 1}
