"""Volumes with outlines in NIfTI: `<case>.nii.gz`, `<case>_lungs.nii.gz` and `<case>_lesions.nii.gz`."""

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform

from covidjax.data.masked_slices import KINDS, Outlined, Unit, check_values, combine_masks, read_metadata_sources
from covidjax.data.masked_split import split_by_source
from covidjax.data.preprocess import apply_window
from covidjax.data.scan.hounsfield import HounsfieldCheck, round_plane
from covidjax.data.scan.nifti import open_nifti, report_damage
from covidjax.errors import UserError, join_faults

ENDINGS = ('.nii.gz', '.nii')
LUNGS, LESIONS = '_lungs', '_lesions'
_ORDER = axcodes2ornt(('I', 'P', 'L'))  # slices to the feet, rows to the back, columns to the patient's left
_MAX_SHIFT = 0.5  # voxels between the corners of a mask and of its scan


def list_volumes(folder: Path) -> list[Unit]:
    """Lists the volumes of a folder. See `masked.read_masked` for names, values and splits.

    Raises:
      UserError: a mask without its scan or a scan without a mask (all counted, the first 20 named).
    """
    files: dict[str, Path] = {}
    faults = []
    for path in sorted(folder.iterdir()):
        ending = next((ending for ending in ENDINGS if path.name.endswith(ending)), None)
        if ending is None:
            continue
        first = files.setdefault(path.name.removesuffix(ending), path)
        if first is not path:
            faults.append(f'{path.name} and {first.name} are one case: keep one of them')
    masks = {name for name in files if name.endswith((LUNGS, LESIONS))}
    for name in sorted(masks):
        case = name.removesuffix(LUNGS).removesuffix(LESIONS)
        if case not in files:
            faults.append(f'{files[name].name}: its scan {case}.nii.gz is missing')
    cases = sorted(files.keys() - masks)
    faults += [
        f'{files[case].name}: {case}{LUNGS}.nii.gz and {case}{LESIONS}.nii.gz are missing'
        for case in cases
        if not masks & {case + LUNGS, case + LESIONS}
    ]
    if faults:
        raise UserError(f'bad volumes in {folder}, fix them and run again: {join_faults(faults)}')
    named, default = read_metadata_sources(folder), folder.resolve().name
    sources = [named.get(case, default) for case in cases]
    splits = split_by_source(cases, sources, with_test=True)
    return [
        Unit(
            where='',
            split=split,
            patient=case,
            source=source,
            volume=case,
            read=functools.partial(_read_volume, case, files[case], files.get(case + LUNGS), files.get(case + LESIONS)),
            work=200,
        )
        for case, source, split in zip(cases, sources, splits, strict=True)
    ]


class _Voxels:
    """A NIfTI volume, read plane by plane as axial slices from head to feet, patient's right on the left."""

    def __init__(self, path: Path):
        data = path.read_bytes()
        with report_damage():
            self._image, self.shape = open_nifti(data)
            self.affine = np.asarray(self._image.affine, np.float64)
        try:
            turn = io_orientation(self.affine)
            lengths = np.linalg.norm(self.affine[:3, :3], axis=0)
            axes = [turn[:, 0].tolist().index(world) for world in range(3)]  # voxel axes of right, front, head
            is_sound = abs(self.affine[2, axes[2]]) / lengths[axes[2]] > 0.8 and np.isfinite(lengths).all()
        except (ValueError, ArithmeticError, np.linalg.LinAlgError):
            is_sound = False
        if not is_sound:
            raise ValueError('its slices are oblique or its header makes no sense: resample it to axial slices')
        self._turn = ornt_transform(turn, _ORDER)
        self._axis, self._is_upward = axes[2], turn[axes[2], 1] > 0
        self.spacing_mm = float(lengths[axes[1]]), float(lengths[axes[0]]), float(lengths[axes[2]])
        self.num_slices = self.shape[self._axis]

    def read_planes(self) -> Iterator[np.ndarray]:
        """Yields [H, W] from head to feet."""
        shape = list(self.shape)
        shape[self._axis] = 1
        places = range(self.num_slices)
        for place in reversed(places) if self._is_upward else places:
            with report_damage():
                index = [slice(None)] * len(self._image.shape)
                index[self._axis] = slice(place, place + 1)
                plane = np.asanyarray(self._image.dataobj[tuple(index)]).reshape(shape)
            yield np.ascontiguousarray(apply_orientation(plane, self._turn)[0])


def _read_volume(case: str, scan_path: Path, lungs_path: Path | None, lesions_path: Path | None) -> Iterator[Outlined]:
    """Yields the slices of a volume. Its masks and greys are checked before the first slice."""
    with _name_faults(scan_path):
        scan = _Voxels(scan_path)
        is_grey = _has_greys(scan)
    lungs = None if lungs_path is None else _open_mask(lungs_path, scan)  # 1 and 2 may be left and right
    lesions = None if lesions_path is None else _open_mask(lesions_path, scan)
    has_kinds = lesions is not None and any((plane == 2).any() for plane in lesions.read_planes())
    nothing = itertools.repeat(None)
    planes = zip(
        scan.read_planes(),
        nothing if lungs is None else lungs.read_planes(),
        nothing if lesions is None else lesions.read_planes(),
        strict=False,
    )
    for index, (plane, lung, lesion) in enumerate(planes):
        plane = round_plane(plane)
        grey = plane.astype(np.uint8) if is_grey else apply_window(plane)
        masks = combine_masks(
            None if lung is None else lung > 0,
            None if lesion is None else lesion > 0,
            lesion.astype(np.uint8) if has_kinds else None,
        )
        yield Outlined(f'{case}_{index:04d}', index, scan.spacing_mm, grey, masks)


def _open_mask(path: Path, scan: _Voxels) -> _Voxels:
    """Opens a mask. Raises ValueError if it has another shape or geometry, or values other than 0, 1 and 2."""
    with _name_faults(path):
        mask = _Voxels(path)
        if mask.shape != scan.shape:
            raise ValueError(f'a mask of {_format(mask.shape)} voxels, its scan has {_format(scan.shape)}')
        corners = [(*corner, 1) for corner in itertools.product(*((0, size - 1) for size in scan.shape))]
        corners_4x8 = np.array(corners, float).T
        shift = np.abs(np.linalg.solve(scan.affine, mask.affine @ corners_4x8) - corners_4x8).max()
        if not shift <= _MAX_SHIFT:
            raise ValueError(
                f'its header puts the mask {shift:.1f} voxels away from its scan: save it with the geometry of the scan'
            )
        for plane in mask.read_planes():
            check_values(plane, KINDS)
    return mask


def _format(shape: Sequence[int]) -> str:
    return ' x '.join(map(str, shape))


def _has_greys(scan: _Voxels) -> bool:
    """Returns whether all voxels lie in 0..255. Raises ValueError if they are no Hounsfield units either."""
    low, high, check = np.inf, -np.inf, HounsfieldCheck()
    for plane in scan.read_planes():
        plane = round_plane(plane)
        check.add(plane)
        low, high = min(low, plane.min()), max(high, plane.max())
    if low >= 0 and high <= 255:
        return True
    check.finish()
    return False


@contextlib.contextmanager
def _name_faults(path: Path) -> Iterator[None]:
    """Puts the name of the file before the message of a ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(f'{path.name}: cannot be read ({error.strerror})') from error
    except ValueError as error:
        raise ValueError(f'{path.name}: {error}') from error
