"""What the worker does for a job: the same as `covidjax predict`, and pictures for the viewer.

This is the only module here that knows the model. The server does not import it: it takes seconds, and memory.
"""

import contextlib
import csv
import functools
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import covidjax
from covidjax.data.lists import CLASSES
from covidjax.data.scan.volume import Volume, read_volume
from covidjax.errors import UserError
from covidjax.experiment.runs import Run, load_run
from covidjax.files import replace_file, write_json
from covidjax.predict.scan import create_recipe, predict_scan, write_dicom, write_dicom_refusal
from covidjax.report.burden import LesionPrediction
from covidjax.report.prediction import Prediction, write_page
from covidjax.serve.pictures import write_pictures
from covidjax.serve.words import describe_prediction
from covidjax.serve.worker import Job, Predict
from covidjax.training import runtime


def load_predictor(workdir: Path | None) -> tuple[dict[str, Any], Predict]:
    """Loads a run; see `worker.Load`."""
    runtime.keep_freed_memory()
    runtime.use_compilation_cache()
    run = load_run(workdir)
    about = {
        'model': run.results['model'],
        'trained_on': run.results['data'],
        'notice': run.results['notice'],
        'warnings': run.results.get('warnings', []),
        'classes': list(CLASSES),
        'program': f'covidjax {covidjax.__version__}',
    }
    return about, functools.partial(predict_job, run)


def predict_job(run: Run, job: Job, report_stage: Callable[[str], None]) -> None:
    """Predicts a scan and writes prediction.json, prediction.html, slices.csv, view.json and pictures.

    Raises:
      UserError: the scan is refused.
    """
    files = sorted(job.source.iterdir())
    path = files[0] if len(files) == 1 else job.source
    report_stage('reading')
    start = time.perf_counter()
    try:
        volume = read_volume(path, job.series, with_lungs=True, hu_step=create_recipe(run, windows=3).hu_step)
        volume = volume._replace(name=f'scan {volume.sha256[:8]}')  # the name of an upload may be that of a patient
        seconds = {'reading': time.perf_counter() - start}
        report_stage('predicting')
        prediction = predict_scan(run, volume, seconds, force=job.force, path=path)
    except UserError as error:
        if job.dicom:
            with _open_dicom(job) as folder:
                write_dicom_refusal(run, folder, path, job.series, error)
        raise
    report_stage('drawing')
    write_page(job.results / 'prediction.html', volume, prediction, run.results)
    write_json(job.results / 'prediction.json', prediction.summary)
    write_slices(job.results / 'slices.csv', prediction.summary)
    layers = write_pictures(job.results, volume, prediction, run.results)
    view = describe_prediction(prediction.summary) | {'layers': layers}
    if job.dicom and volume.kind == 'DICOM':
        view['reasons'] += _write_dicom(run, job, path, volume, prediction)
    write_json(job.results / 'view.json', view)


def _write_dicom(
    run: Run, job: Job, path: Path, volume: Volume, prediction: Prediction | LesionPrediction
) -> list[str]:
    """Writes dicom.zip; returns why it could not, if so."""
    try:
        with _open_dicom(job) as folder:
            write_dicom(run, folder, path, job.series, volume, prediction)
    except UserError as error:
        text = str(error).removeprefix(f'{path}: ')
        return [f'{text[0].upper()}{text[1:]}.']
    return []


@contextlib.contextmanager
def _open_dicom(job: Job) -> Iterator[Path]:
    """Yields a folder, and makes dicom.zip of what is in it afterwards."""
    with TemporaryDirectory(dir=job.results) as name:
        folder = Path(name, 'dicom')
        yield folder
        files = sorted(folder.iterdir()) if folder.exists() else []
        if files:
            with zipfile.ZipFile(job.results / 'dicom.zip', 'w', zipfile.ZIP_DEFLATED) as archive:
                for file in files:
                    archive.write(file, file.name)


def write_slices(path: Path, summary: dict[str, Any]) -> None:
    """Writes the slices of prediction.json as a table: a row for each, lists of classes as a column for each class."""
    rows = []
    slices = summary['slices'] if 'slices' in summary else summary['lesions']['slices']
    for one in slices:
        row = {}
        for name, value in one.items():
            if isinstance(value, list):
                parts = CLASSES if len(value) == len(CLASSES) else range(len(value))
                row |= {f'{name}_{part}': item for part, item in zip(parts, value, strict=True)}
            else:
                row[name] = value
        rows.append(row)
    with replace_file(path) as temporary, temporary.open('w', newline='') as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
