import csv
import gzip
import io
import tracemalloc
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_files
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    EnhancedCTImageStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    SecondaryCaptureImageStorage,
)

from covidjax.data.preprocess import apply_window
from covidjax.data.scan import dicom, sources
from covidjax.data.scan.series import group_series
from covidjax.data.scan.volume import read_volume
from covidjax.errors import UserError
from tests.scan_files import (
    IDENTITY,
    change_syntax,
    create_nifti,
    encode_dicom,
    make_chest,
    make_dicom,
    write_images,
    write_series,
)

HU = make_chest()
GREY = apply_window(HU)


@pytest.fixture
def scan(tmp_path):
    return write_series(tmp_path / 'scan', HU)


def refuse(path, match, **options):
    with pytest.raises(UserError, match=match) as caught:
        read_volume(path, **options)
    message = str(caught.value)
    assert '\n' not in message
    assert str(path) in message
    assert not any(value.lower() in message.lower() for value in (*IDENTITY.values(), 'secret'))


def test_window_by_hand():
    np.testing.assert_array_equal(apply_window(np.array([-3000, -1350, -600, 150, 3000])), [0, 0, 128, 255, 255])


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'flip': True},
        {'slope': 2, 'intercept': -1500},
        {'heights': 5.0 * np.arange(20)[::-1] + 0.3},
        {'ImageType': ['DERIVED', 'SECONDARY', 'AXIAL']},
    ],
)
def test_slices_run_from_head_to_feet_whatever_the_names_and_the_pose(tmp_path, options):
    volume = read_volume(write_series(tmp_path / 'scan', HU // 2 * 2, **options))
    np.testing.assert_array_equal(volume.slices, apply_window(HU // 2 * 2))
    np.testing.assert_allclose(volume.depths_mm, 5 * np.arange(20), atol=1e-6)
    assert (volume.kind, volume.name, volume.notes, volume.doubts) == ('DICOM', 'scan', [], [])


def test_zip_and_nifti_give_the_same_pixels(scan, tmp_path):
    with zipfile.ZipFile(tmp_path / 'scan.zip', 'w') as archive:
        for file in scan.iterdir():
            archive.write(file, f'deep/below/{file.name}')
    folder, zipped = read_volume(scan), read_volume(tmp_path / 'scan.zip')
    np.testing.assert_array_equal(folder.slices, zipped.slices)
    assert folder.sha256 == zipped.sha256
    for number, codes in enumerate((('L', 'A', 'S'), ('R', 'P', 'S'), ('S', 'L', 'P'), ('P', 'I', 'R'))):
        path = tmp_path / f'{number}.nii{".gz" if number % 2 else ""}'
        nibabel.save(create_nifti(HU, codes), path)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.slices, folder.slices)
        np.testing.assert_allclose(volume.depths_mm, folder.depths_mm)


def test_lungs_of_a_nifti_do_not_depend_on_its_axes(scan, tmp_path):
    expected = read_volume(scan, with_lungs=True).lungs
    assert np.ptp(expected.hu_txhxw) > 500
    for number, codes in enumerate((('L', 'P', 'I'), ('L', 'A', 'S'), ('S', 'L', 'P'), ('P', 'I', 'R'))):
        path = tmp_path / f'{number}.nii{".gz" if number % 2 else ""}'
        nibabel.save(create_nifti(HU, codes), path)
        lungs = read_volume(path, with_lungs=True).lungs
        np.testing.assert_array_equal(lungs.hu_txhxw, expected.hu_txhxw)
        np.testing.assert_array_equal(lungs.lungs_txhxw, expected.lungs_txhxw)


@pytest.mark.parametrize('codes', [('L', 'A', 'S'), ('S', 'L', 'P')])
@pytest.mark.parametrize('ending', ['.nii', '.nii.gz'])
def test_a_nifti_takes_a_byte_a_voxel(tmp_path, codes, ending):
    hu = HU.repeat(4, 0).repeat(4, 1).repeat(4, 2)
    image = create_nifti(hu, codes)
    double = nibabel.Nifti1Image(image.get_fdata(), image.affine)
    double.set_sform(double.affine, 1)
    nibabel.save(double, tmp_path / f'scan{ending}')
    read_volume(tmp_path / f'scan{ending}')  # caches
    tracemalloc.start()
    volume = read_volume(tmp_path / f'scan{ending}')
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    np.testing.assert_array_equal(volume.slices, apply_window(hu))
    assert peak < hu.size + 8_000_000  # some planes; the file has 42 MB


def test_images_are_counted_and_taken_as_they_are(tmp_path):
    volume = read_volume(write_images(tmp_path / 'png', GREY))
    np.testing.assert_array_equal(volume.slices, GREY)
    assert volume.depths_mm is None
    sixteen = write_images(tmp_path / 'png16', GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_volume(sixteen).slices, GREY)
    same = write_images(tmp_path / 'rgb', np.repeat(GREY[..., np.newaxis], 3, -1))
    np.testing.assert_array_equal(read_volume(same).slices, GREY)
    np.testing.assert_array_equal(read_volume(tmp_path / 'png' / 'slice3.png').slices, GREY[3:4])


@pytest.mark.parametrize(
    ('name', 'syntax'),
    [
        ('JPEGLosslessProcess14_1', JPEGLosslessSV1),
        ('JPEGLosslessProcess14', JPEGLossless),
        ('JPEGLSLossless', JPEGLSLossless),
        ('JPEG2000Lossless', JPEG2000Lossless),
        ('RLELossless', RLELossless),
        ('ImplicitVRLittleEndian', ImplicitVRLittleEndian),
    ],
)
def test_transfer_syntaxes_give_the_same_values(scan, name, syntax):
    for path in scan.iterdir():
        change_syntax(path, name)
        assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    np.testing.assert_array_equal(load_hu(scan), HU)


def load_hu(folder):
    with sources.open_entries(folder) as entries:
        frames = [frame for entry in entries for frame in dicom.read_frames(entry, entry.read())]
        return np.stack(list(dicom.compute_planes(group_series(frames)[0].frames)))


def encode_as(dataset, syntax):
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    is_big = syntax == ExplicitVRBigEndian
    if is_big:
        dataset.PixelData = np.frombuffer(dataset.PixelData, '<u2').astype('>u2').tobytes()
    pydicom.dcmwrite(buffer, dataset, implicit_vr=False, little_endian=not is_big, enforce_file_format=True)
    return buffer.getvalue()


@pytest.mark.parametrize('syntax', [ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian])
def test_big_endian_and_deflated_files(tmp_path, syntax):
    for number, pixels in enumerate(HU):
        (tmp_path / f'{number}.dcm').write_bytes(encode_as(make_dicom(pixels, -5.0 * number), syntax))
    np.testing.assert_array_equal(load_hu(tmp_path), HU)


def test_deflated_bombs(tmp_path):
    dataset = make_dicom(HU[0], 0.0)
    dataset.add_new(0x00091010, 'OB', bytes(10_000_000))
    (tmp_path / 'bomb').write_bytes(encode_as(dataset, DeflatedExplicitVRLittleEndian))
    refuse(tmp_path / 'bomb', 'inflate to more than 200 times')


def test_frames_of_one_file_are_ordered_by_position(tmp_path):
    order = np.random.default_rng(1).permutation(len(HU))
    dataset = make_dicom(HU[0], 0.0, SOPClassUID=EnhancedCTImageStorage, NumberOfFrames=len(HU))
    dataset.PixelData = (HU[order].astype(np.int32) + 1024).astype(np.uint16).tobytes()
    plane, measures, values = Dataset(), Dataset(), Dataset()
    plane.ImageOrientationPatient, measures.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
    values.RescaleSlope, values.RescaleIntercept = 1, -1024
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence = Sequence([plane])
    shared.PixelMeasuresSequence = Sequence([measures])
    shared.PixelValueTransformationSequence = Sequence([values])
    for place in order:
        position, frame = Dataset(), Dataset()
        position.ImagePositionPatient = [-31.5, -31.5, -5.0 * place]
        frame.PlanePositionSequence = Sequence([position])
        frames.append(frame)
    dataset.SharedFunctionalGroupsSequence = Sequence([shared])
    dataset.PerFrameFunctionalGroupsSequence = Sequence(frames)
    for name in ('ImagePositionPatient', 'ImageOrientationPatient', 'PixelSpacing', 'RescaleSlope', 'RescaleIntercept'):
        delattr(dataset, name)
    (tmp_path / 'scan.dcm').write_bytes(encode_dicom(dataset))
    np.testing.assert_array_equal(read_volume(tmp_path / 'scan.dcm').slices, GREY)


def test_what_is_no_slice_of_the_chest_is_left_out_and_told(scan):
    copy = next(scan.iterdir())
    (scan / 'copy').write_bytes(copy.read_bytes())
    (scan / 'scout').write_bytes(encode_dicom(make_dicom(HU[0], 0.0, ImageType=['ORIGINAL', 'PRIMARY', 'LOCALIZER'])))
    (scan / 'capture').write_bytes(encode_dicom(make_dicom(HU[0], 0.0, SOPClassUID=SecondaryCaptureImageStorage)))
    (scan / 'coronal').write_bytes(encode_dicom(make_dicom(HU[0], 0, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])))
    (scan / 'report.txt').write_text('hello')
    abdomen = {'series': '1.2.3.5', 'number': 5, 'BodyPartExamined': 'ABDOMEN'}
    write_series(scan / 'abdomen', np.concatenate([HU, HU]), **abdomen)
    volume = read_volume(scan)
    np.testing.assert_array_equal(volume.slices, GREY)
    facts = dict(volume.facts)
    assert facts['series'] == 'series 4: 20 slices of 64 x 64, 5 mm thick'
    assert facts['other series'] == 'series 5: 40 slices of 64 x 64, 5 mm thick'
    for words in ('1 localizers', '1 secondary captures', '1 not axial', '1 not DICOM', '1 copies'):
        assert words in facts['left out']
    assert len(read_volume(scan, series='5').slices) == 40
    refuse(scan, '--series=4, 5', series='6')


def test_two_studies_need_a_choice(scan):
    write_series(scan / 'other', HU[:5], study='9.9', series='9.9.1')
    refuse(scan, 'choose one with --series: series 4a: 20 slices')
    assert len(read_volume(scan, series='4b').slices) == 5


def test_tilt_and_missing_slices_are_noted(tmp_path):
    heights = -5.0 * np.delete(np.arange(21), 9)
    volume = read_volume(write_series(tmp_path / 'gap', HU, heights=heights))
    assert 'uneven, 5.00 to 10.00 mm' in volume.notes[0]
    tilted = [1, 0, 0, 0, np.cos(np.radians(20)).round(6), -np.sin(np.radians(20)).round(6)]
    volume = read_volume(write_series(tmp_path / 'tilted', HU, ImageOrientationPatient=tilted))
    assert 'tilted by 20 degrees' in volume.notes[0]
    np.testing.assert_array_equal(volume.slices, GREY)


def test_two_pictures_of_one_place(scan):
    write_series(scan / 'again', HU)  # the same pixels with other UIDs
    assert 'stood there twice' in read_volume(scan).notes[0]
    write_series(scan / 'phase', np.where(HU == 40, 90, HU))
    refuse(scan, 'different pictures of one place')


def test_damaged_dicom(scan):
    file = next(scan.iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    refuse(scan, f'cannot be decoded.*{file.name}')
    file.write_bytes(whole.replace(b'DS', b'XX'))
    assert read_volume(scan).doubts == ['1 damaged files: slices may be missing']


def test_inputs_without_a_ct(tmp_path):
    cases = {
        'scout': ({'ImageType': ['ORIGINAL', 'PRIMARY', 'LOCALIZER']}, r'no axial CT slice in it \(1 localizers'),
        'xray': ({'Modality': 'DX'}, 'projection X-rays'),
        'mr': ({'Modality': 'MR'}, '1 not CT'),
        'colour': ({'SamplesPerPixel': 3, 'PhotometricInterpretation': 'RGB'}, 'in colour'),
        'nowhere': ({'ImagePositionPatient': None}, 'without a position'),
        'huge': ({'Rows': 60000, 'Columns': 60000}, 'of impossible size'),
        'nan': ({'RescaleSlope': 0}, 'damaged'),
    }
    for name, (tags, match) in cases.items():
        (tmp_path / name).write_bytes(encode_dicom(make_dicom(HU[0], 0.0, **tags)))
        refuse(tmp_path / name, match)
    refuse(tmp_path / 'absent', 'no such file')
    (tmp_path / 'empty').mkdir()
    refuse(tmp_path / 'empty', 'no DICOM, NIfTI or image')
    (tmp_path / 'text.txt').write_text('hello')
    refuse(tmp_path / 'text.txt', 'no DICOM, NIfTI or image')
    refuse(write_series(tmp_path / 'unscaled', HU, intercept=-1024, RescaleIntercept=3000), 'not the Hounsfield units')


def test_files_of_pydicom_are_read_or_refused_in_one_line():
    files = [Path(name) for name in get_testdata_files() if Path(name).is_file()]
    assert len(files) > 100
    read, reasons = set(), []
    for path in files:
        try:
            read_volume(path)
            read.add(path.name)
        except UserError as error:
            reasons.append(str(error))
    assert not any('\n' in reason for reason in reasons)
    assert {'693_J2KI.dcm', 'J2K_pixelrep_mismatch.dcm'} <= read  # CT of a head and of a phantom


def test_dicom_that_begins_as_tiff_does(scan):
    for path in scan.iterdir():
        path.write_bytes(b'II*\0' + path.read_bytes()[4:])
    np.testing.assert_array_equal(read_volume(scan).slices, GREY)


def test_images_that_are_no_slices(tmp_path, monkeypatch):
    colour = np.repeat(GREY[..., np.newaxis], 3, -1)
    colour[:, :10, :10] = (255, 0, 0)
    refuse(write_images(tmp_path / 'colour', colour[:2]), r'in colour.*2 in all')
    refuse(write_images(tmp_path / 'small', GREY[:1, :20]), 'too small')
    assert 'one grey' in read_volume(write_images(tmp_path / 'dark', GREY[:2] // 16)).doubts[0]
    frames = [Image.fromarray(s) for s in GREY[:3]]
    frames[0].save(tmp_path / 'many.tiff', save_all=True, append_images=frames[1:])
    refuse(tmp_path / 'many.tiff', '3 pictures in one file')
    (tmp_path / 'cut.png').write_bytes((tmp_path / 'small' / 'slice0.png').read_bytes()[:60])
    refuse(tmp_path / 'cut.png', 'unreadable')
    monkeypatch.setattr(dicom, 'MAX_VOXELS', 3 * GREY[0].size)
    assert len(read_volume(write_images(tmp_path / 'three', GREY[:3])).slices) == 3
    refuse(write_images(tmp_path / 'four', GREY[:4]), 'more than 12,288 pixels')


def test_niftis_that_are_no_scan(tmp_path):
    def save(name, array, affine=None):
        nibabel.save(nibabel.Nifti1Image(array, np.diag([1.0, 1, 5, 1]) if affine is None else affine), tmp_path / name)
        return tmp_path / name

    hu = HU.transpose(2, 1, 0).astype(np.float32)
    broken = hu.copy()
    broken[3, 3, 3] = np.nan
    refuse(save('nan.nii', broken), 'NaN or infinite')
    refuse(save('unit.nii', (hu + 1000) / 2000), 'not the Hounsfield units')
    refuse(save('four.nii', np.stack([hu, hu], -1)), 'one scan of at most')
    turned = np.array([[1, 0, 0, 0], [0, 0.6, -0.8, 0], [0, 0.8, 0.6, 0], [0, 0, 0, 1]])
    refuse(save('oblique.nii', hu, turned), 'oblique')
    whole = save('whole.nii.gz', hu).read_bytes()
    (tmp_path / 'cut.nii.gz').write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / 'cut.nii.gz', r'truncated \.nii\.gz')
    (tmp_path / 'cut.nii').write_bytes(gzip.decompress(whole)[:5000])
    refuse(tmp_path / 'cut.nii', 'truncated NIfTI')
    image = nibabel.Nifti1Image(hu, None)
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nibabel.save(image, tmp_path / 'lost.nii')
    assert 'orientation' in read_volume(tmp_path / 'lost.nii').doubts[0]


def test_hostile_archives(tmp_path, monkeypatch):
    def write(name, member, data, **options):
        with zipfile.ZipFile(tmp_path / name, 'w', **options) as archive:
            archive.writestr(member, data)
        return tmp_path / name

    refuse(write('slip.zip', '../../etc/x', b'x'), 'outside itself')
    refuse(write('root.zip', '/etc/x', b'x'), 'outside itself')
    whole = write('a.zip', 'a.dcm', encode_dicom(make_dicom(HU[0], 0.0)))
    locked = bytearray(whole.read_bytes())
    for magic, offset in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        locked[locked.find(magic) + offset] |= 1
    (tmp_path / 'locked.zip').write_bytes(locked)
    refuse(tmp_path / 'locked.zip', 'encrypted')
    (tmp_path / 'cut.zip').write_bytes(whole.read_bytes()[:500])
    refuse(tmp_path / 'cut.zip', 'truncated zip')
    monkeypatch.setattr(sources, '_SMALL', 1000)
    refuse(write('bomb.zip', 'a', bytes(1_000_000), compression=zipfile.ZIP_DEFLATED), 'zip bomb')
    monkeypatch.setattr(sources, 'MAX_FILES', 0)
    refuse(whole, 'name the folder of one scan')


def test_real_scan_is_in_the_order_of_its_list(real_data):
    folder = real_data / 'dicom' / 'covid_p001'
    with (real_data / 'dicom' / 'covid_p001_slices.csv').open() as file:
        expected = [row['dicom'] for row in csv.DictReader(file)]
    with sources.open_entries(folder) as entries:
        frames = [frame for entry in entries for frame in dicom.read_frames(entry, entry.read())]
        series = group_series(frames)
        assert [frame.entry.name for frame in series[0].frames] == expected
        hu = list(dicom.compute_planes(series[0].frames[60:62]))
    pixels = pydicom.dcmread(folder / expected[60]).pixel_array
    np.testing.assert_array_equal(hu[0], pixels.astype(int) - 1024)
