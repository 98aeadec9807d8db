"""Data folders of the benchmarks, created from phantoms once and kept in the workdir."""

import os
from pathlib import Path

from PIL import Image

from covidjax.data import covidx_ct, lists, phantom
from covidjax.files import replace_file

NUM_PATIENTS = {'num_train': 9, 'num_val': 3, 'num_test': 3}


def write_raw_folder(workdir: Path, *, num_slices: int, raw_size: int) -> Path:
    """Creates a raw COVIDx-CT folder with `num_slices` training slices and returns its path.

    Only a few phantoms are generated; the folder links to the same files under many names.
    """
    folder = workdir / f'raw_{num_slices}_{raw_size}'
    drawn = workdir / f'phantoms_{raw_size}'
    phantom.write_phantoms(drawn, phantom.PhantomOptions(image_size=raw_size, **NUM_PATIENTS))
    rows = lists.read_lists(str(drawn))
    images = folder / phantom.IMAGE_FOLDER
    images.mkdir(parents=True, exist_ok=True)
    copies = -(-num_slices // len(rows['train']))
    for split in lists.SPLITS:
        lines = []
        for i in range(copies if split == 'train' else 1):
            for row in rows[split]:
                name = f'copy{i}-{row.file}'
                lines.append(f'{name} {row.label} {" ".join(map(str, row.box))}\n')
        lines = lines[:num_slices] if split == 'train' else lines
        for line in lines:
            name = line.split(' ', 1)[0]
            if not (images / name).exists():
                os.link(drawn / phantom.IMAGE_FOLDER / name.split('-', 1)[1], images / name)
        with replace_file(folder / lists.get_list_name(split, '2A')) as temporary:
            temporary.write_text(''.join(lines))
    return folder


def write_png_folder(workdir: Path, data: covidx_ct.Prepared, image_size: int) -> Path:
    """Writes the prepared training slices as <class>/<number>.png, for torchvision's ImageFolder."""
    folder = workdir / f'png_{len(data.sources["train"])}_{image_size}'
    for label in range(len(lists.CLASSES)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
    for i in range(len(data.sources['train'])):
        record = data.sources['train'][i]
        path = folder / str(record['label']) / f'{i}.png'
        if not path.exists():
            with replace_file(path) as temporary:
                Image.fromarray(record['image'][..., 0]).save(temporary, format='PNG')
    return folder
