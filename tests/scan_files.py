"""A small synthetic chest in Hounsfield units, and writers of DICOM, NIfTI and image files of it."""

import io

import gdcm
import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

IDENTITY = {
    'PatientName': 'Secretname^Anna',
    'PatientID': 'SECRET-4711',
    'PatientBirthDate': '19010203',
    'AccessionNumber': 'SECRETACC',
    'InstitutionName': 'Secret Hospital',
    'ReferringPhysicianName': 'Secretdoctor',
    'StudyDescription': 'Secretname thorax',
}


def make_chest(num_slices=20, size=64):
    """Returns int16 HU [T, H, W] from head to feet: a body in air with two lungs, the left one smaller."""
    rows, columns = np.mgrid[:size, :size] / size
    hu = np.full((num_slices, size, size), -1000, np.int16)
    for t in range(num_slices):
        hu[t][((rows - 0.5) / 0.36) ** 2 + ((columns - 0.5) / 0.46) ** 2 < 1] = 40
        for centre, width in ((0.3, 0.14), (0.7, 0.11)):
            lung = ((rows - 0.48) / (0.2 + 0.003 * t)) ** 2 + ((columns - centre) / width) ** 2 < 1
            hu[t][lung] = -850 + 5 * t
        hu[t, size // 2 : size // 2 + 3, 18 : 20 + t % 5] = -300
    return hu


def make_dicom(hu_HxW, z, *, study='1.2.3', series='1.2.3.4', number=4, slope=1, intercept=-1024, flip=False, **tags):
    """Returns the dataset of one slice at `z` mm, positive towards the head. `flip` puts the patient face down."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset('', {}, file_meta=meta, preamble=bytes(128))
    stored = (hu_HxW[::-1, ::-1] if flip else hu_HxW).astype(np.int32)
    values = {
        **IDENTITY,
        'SOPClassUID': CTImageStorage,
        'SOPInstanceUID': meta.MediaStorageSOPInstanceUID,
        'StudyInstanceUID': study,
        'SeriesInstanceUID': series,
        'SeriesNumber': number,
        'Modality': 'CT',
        'ImageType': ['ORIGINAL', 'PRIMARY', 'AXIAL'],
        'SliceThickness': 5,
        'ImagePositionPatient': [31.5, 31.5, z] if flip else [-31.5, -31.5, z],
        'ImageOrientationPatient': [-1, 0, 0, 0, -1, 0] if flip else [1, 0, 0, 0, 1, 0],
        'PixelSpacing': [1, 1],
        'RescaleSlope': slope,
        'RescaleIntercept': intercept,
        'SamplesPerPixel': 1,
        'PhotometricInterpretation': 'MONOCHROME2',
        'Rows': hu_HxW.shape[0],
        'Columns': hu_HxW.shape[1],
        'BitsAllocated': 16,
        'BitsStored': 16,
        'HighBit': 15,
        'PixelRepresentation': 0,
        'PixelData': ((stored - intercept) / slope).astype(np.uint16).tobytes(),
        **tags,
    }
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def encode_dicom(dataset: Dataset) -> bytes:
    """Returns the bytes of a DICOM file."""
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, dataset, enforce_file_format=True)
    return buffer.getvalue()


def write_series(folder, hu, *, heights=None, **options):
    """Writes one file per slice under shuffled names; by default the slices are 5 mm apart."""
    folder.mkdir(parents=True, exist_ok=True)
    heights = -5.0 * np.arange(len(hu)) if heights is None else heights
    names = np.random.default_rng(0).permutation(len(hu))
    for pixels, z, name in zip(hu, heights, names, strict=True):
        (folder / f'IM{name}').write_bytes(encode_dicom(make_dicom(pixels, float(z), **options)))
    return folder


def create_nifti(hu, codes=('L', 'A', 'S')):
    """Returns a chest as NIfTI with axes in the directions `codes`."""
    affine = np.diag([-1.0, -1.0, -5.0, 1.0])  # columns to the left, rows to the back, slices to the feet
    start = nibabel.orientations.axcodes2ornt(('L', 'P', 'I'))
    turn = nibabel.orientations.ornt_transform(start, nibabel.orientations.axcodes2ornt(codes))
    image = nibabel.Nifti1Image(hu.transpose(2, 1, 0), affine)
    image.set_sform(affine, 1)
    return image.as_reoriented(turn)


def write_images(folder, slices, *, template='slice{}.png'):
    """Writes one image per slice; the numbers in the names are not zero-padded."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(slices):
        Image.fromarray(pixels).save(folder / template.format(number))
    return folder


def change_syntax(path, name):
    """Rewrites a DICOM file in the transfer syntax `name` of gdcm.TransferSyntax."""
    reader, writer, change = gdcm.ImageReader(), gdcm.ImageWriter(), gdcm.ImageChangeTransferSyntax()
    reader.SetFileName(str(path))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(getattr(gdcm.TransferSyntax, name)))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(path))
    assert writer.Write()
