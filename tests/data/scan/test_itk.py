import numpy as np
import pytest

from covidjax.data.preprocess import apply_window
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from tests.scan_files import make_chest

sitk = pytest.importorskip('SimpleITK')
HU = make_chest()


def save(path, hu=HU, *, direction=(1, 0, 0, 0, 1, 0, 0, 0, -1), compress=False):
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((1, 1, 5))
    image.SetDirection(direction)
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


@pytest.mark.parametrize('name', ['scan.mha', 'scan.mhd', 'scan.nrrd', 'scan.nhdr'])
@pytest.mark.parametrize('compress', [False, True])
def test_the_pixels_are_those_of_dicom(tmp_path, name, compress):
    volume = read_volume(save(tmp_path / name, compress=compress))
    np.testing.assert_array_equal(volume.slices, apply_window(HU))
    np.testing.assert_allclose(volume.depths_mm, 5 * np.arange(20))
    assert volume.kind == ('NRRD' if name.endswith(('nrrd', 'nhdr')) else 'MetaImage')
    assert read_volume(tmp_path).sha256 != ''  # the folder with header and data, too


def test_orientation_is_that_of_the_header(tmp_path):
    turned = save(tmp_path / 'turned.nrrd', HU[::-1, ::-1], direction=(1, 0, 0, 0, -1, 0, 0, 0, 1))
    np.testing.assert_array_equal(read_volume(turned).slices, apply_window(HU))
    tilted = (1, 0, 0, 0, 0.6, -0.8, 0, 0.8, 0.6)
    with pytest.raises(UserError, match='oblique'):
        read_volume(save(tmp_path / 'tilted.mha', direction=tilted))


def test_the_id_covers_voxels_beside_the_header(tmp_path):
    first = read_volume(save(tmp_path / 'scan.mhd')).sha256
    assert read_volume(save(tmp_path / 'scan.mhd', HU + 1)).sha256 != first


def test_what_is_no_scan_is_refused(tmp_path):
    with pytest.raises(UserError, match='not the Hounsfield units'):
        read_volume(save(tmp_path / 'unit.mha', (HU + 1024) // 16))
    sitk.WriteImage(sitk.GetImageFromArray(HU[0]), str(tmp_path / 'flat.mha'))
    with pytest.raises(UserError, match='one scan of at most'):
        read_volume(tmp_path / 'flat.mha')
    whole = save(tmp_path / 'cut.mha').read_bytes()
    (tmp_path / 'cut.mha').write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match='damaged or truncated MetaImage'):
        read_volume(tmp_path / 'cut.mha')
    save(tmp_path / 'far.mhd')
    header = (tmp_path / 'far.mhd').read_text()
    (tmp_path / 'far.mhd').write_text(header.replace('far.raw', '/etc/passwd'))
    with pytest.raises(UserError, match='another folder'):
        read_volume(tmp_path / 'far.mhd')
