"""A predictor without a model, for tests of the server. The worker imports this module, so it imports little."""

import json
import os
import signal
import time

import numpy as np

from covidjax.data.preprocess import encode_png
from covidjax.errors import TooLargeError, UserError

SECRET = 'Secretname^Anna'
ABOUT = {
    'model': 'fake',
    'trained_on': 'phantoms',
    'notice': 'synthetic phantoms, not patients',
    'warnings': [],
    'classes': ['normal', 'pneumonia', 'covid19'],
    'program': 'covidjax test',
    'keep_minutes': 30,
}
COUNT, SIZE = 12, 64


def load(workdir):
    """Loads nothing; a workdir called 'bad' is no run."""
    if workdir.name == 'bad':
        raise UserError(f'{workdir} is not the workdir of a finished run')
    return ABOUT, predict


def predict(job, report_stage):
    """Does what the bytes of the first file ask for."""
    report_stage('reading')
    [first, *_] = sorted(job.source.iterdir())
    with first.open('rb') as file:
        wish = file.read(100).decode(errors='replace')
    if wish.startswith('crash'):
        os.kill(os.getpid(), signal.SIGKILL)
    if wish.startswith('hang'):
        time.sleep(60)
    if wish.startswith('hungry'):
        kept = bytearray(os.urandom(1_000)) * 400_000
        time.sleep(60)
        del kept
    if wish.startswith('doubt') and not job.force:
        if 'dicom' in wish:
            (job.results / 'dicom.zip').write_bytes(b'a report')
        raise UserError(f'{job.source}: the greys do not part: an X-ray? (--force goes on, and says so on the report)')
    if wish.startswith('studies') and job.series is None:
        raise UserError(f'{first}: slices of several studies, choose one with --series: series 3: 20 slices')
    if wish.startswith('bomb'):
        raise TooLargeError(f'{first}: unpacks to more than 200 times its size, taken for a zip bomb')
    if wish.startswith('error'):
        raise ValueError(SECRET)
    if wish.startswith('slow'):
        time.sleep(1)
    report_stage('predicting')
    write_results(job)


def write_results(job):
    """Writes made-up results."""
    shares = [[0.1, 0.2 + 0.05 * t, 0.7 - 0.05 * t] for t in range(COUNT)]
    slices = [
        {
            'number': t + 1,
            'depth_mm': 5.0 * t,
            'box': [4, 4, 60, 60],
            'probabilities': shares[t],
            'attention': None,
            'evidence': [0.0, 0.1, -0.1],
            'novelty': 0.5,
        }
        for t in range(COUNT)
    ]
    summary = {
        'input': {'name': 'scan 01234567', 'sha256': '01234567', 'kind': 'DICOM', 'num_slices': COUNT},
        'reading': {'series': 'series 4: 12 slices', 'region': 'body', 'notes': []},
        'left_out': {},
        'forced': ['an X-ray?'] if job.force else [],
        'notice': ABOUT['notice'],
        'warnings': [],
        'verdict': 'covid19',
        'class': 'covid19',
        'probabilities': {'normal': 0.1, 'pneumonia': 0.2, 'covid19': 0.7},
        'conformal': {'coverage': 0.9, 'notes': [], 'set': ['covid19']},
        'screening': None,
        'rests_on': [1, 2, 3, 4, 6],
        'slices_called': {'normal': 0, 'pneumonia': 5, 'covid19': 7},
        'novelty': {'median': 0.5, 'share_unusual': 0.0},
        'lung_volumes': {'left_ml': 1234.5, 'right_ml': 2345.6},
        'slices': slices,
        'seconds': {'reading': 0.1, 'model': 0.2},
        'series_wanted': job.series,
    }
    layers = {'map': 'attention 1', 'has_lungs': True, 'has_lesions': True, 'is_windowed': True}
    view = {
        'verdict': summary['verdict'],
        'headline': 'The most likely class is covid19, with probability 70.0%.',
        'warnings': [f'Forced in spite of: {doubt}.' for doubt in summary['forced']],
        'reasons': ['The 90% conformal set holds covid19.', 'Predicted classes of the slices: 5 pneumonia, 7 covid19.'],
        'layers': layers,
    }
    for name, value in (('prediction.json', summary), ('view.json', view)):
        (job.results / name).write_text(json.dumps(value))
    (job.results / 'prediction.html').write_text('<p style="color: red">page</p>')
    (job.results / 'slices.csv').write_text('number\n1\n')
    rows, columns = np.mgrid[:SIZE, :SIZE]
    for layer in ('slices', 'maps', 'lungs', 'lesions'):
        (job.results / layer).mkdir()
        for t in range(COUNT):
            grey = np.hypot(rows - 32, columns - 20 - 2 * t) * 4
            grey = (
                (grey < 60) * 255
                if layer == 'lungs'
                else grey.clip(0, 240) // 80 * 80
                if layer == 'lesions'
                else grey.clip(0, 255)
            )
            (job.results / layer / f'{t + 1}.png').write_bytes(encode_png(grey.astype(np.uint8)))
