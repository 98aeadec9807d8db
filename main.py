r"""Trains and tests models that tell normal lungs, pneumonia and COVID-19 apart on chest CT.

A demo on generated phantoms: of slices, or of slices and then scans
  python main.py --config=configs/att2.py --workdir=/tmp/run
  python main.py --config=configs/seq.py --workdir=/tmp/seq

The paper's two experiments; after the colon, the raw COVIDx-CT directory
  python main.py --config=configs/att2.py:/data/covidx-ct --workdir=/tmp/run
  python main.py --config=configs/seq.py:/data/covidx-ct \
    --config.extractor=/tmp/run --workdir=/tmp/seq

Can this dataset be trusted? Lists alone will do
  python main.py --mode=audit --input=/data/covidx-ct

With a run that is finished: test its best model again, write a report on each
CT scan, write it as a program for jax alone, write it for PyTorch
  python main.py --mode=evaluate --workdir=/tmp/run
  python main.py --mode=predict --workdir=/tmp/run --input=/scans/1 \
    --input=/scans/2.nii.gz
  python main.py --mode=export --workdir=/tmp/run --output=model.stablehlo
  python main.py --mode=export --workdir=/tmp/run --output=model.safetensors

A training command that is repeated in its workdir goes on where it stopped;
SIGTERM and Ctrl-C save after the next step. All devices of a host are used; to
use several hosts, start the command on each of them with --coordinator. Any
field of a config can be set, --config.train.batch_size=16 for example; the
fields are in the config's file.
"""

import signal
import sys
import traceback
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from covidjax.command_line import create_parser, refuse_arguments, set_up_log
from covidjax.errors import UserError

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'The experiment, e.g. configs/att2.py, and after a colon its raw COVIDx-CT directory.'
)
_WORKDIR = flags.DEFINE_string(
    'workdir', None, 'Folder of the run; by default runs/<name of the config>, or runs/audit for --mode=audit.'
)
_INPUT = flags.DEFINE_multi_string(
    'input',
    [],
    'Of --mode=predict: a chest CT, as DICOM folder or zip, NIfTI, image folder or image; give it once per scan. Of '
    '--mode=audit: the raw COVIDx-CT directory, or one of lists only',
)
_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'File that --mode=export writes, *.stablehlo or *.safetensors. Folder that --mode=predict writes to, by default '
    '<workdir>/predictions/<input name>.',
)
_SERIES = flags.DEFINE_string('series', None, 'Which DICOM series --mode=predict reads, where there are several.')
_FORCE = flags.DEFINE_bool(
    'force', False, 'Predict in spite of doubts that the input is a chest CT; the report says so.'
)
_LESIONS = flags.DEFINE_string(
    'lesions', None, 'Folder of slices with outlined lesions, for --mode=evaluate of a slice run (see the README).'
)
_OCCLUSION = flags.DEFINE_bool(
    'occlusion', False, 'Score occlusion maps too (slow), for --mode=evaluate of a slice run.'
)
_COORDINATOR = flags.DEFINE_string(
    'coordinator',
    None,
    "For a run of several processes: host:port of the first, or 'auto' under Slurm, Open MPI, Cloud TPU or GKE.",
)
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'How many processes run; with --coordinator=host:port.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which of them this is, from 0; with --coordinator=host:port.')


# Each mode imports what it needs once the flags are right; an audit needs no jax.


def run_training() -> None:
    """Runs the experiment of --config."""
    config = _CONFIG.value
    if config is None:
        raise UserError('--config is required, e.g. --config=configs/att2.py (python main.py --help)')
    start_jax()
    from covidjax import scan_experiment, slice_experiment

    experiments = {'att2': slice_experiment, 'seq': scan_experiment}
    if config.name not in experiments:
        raise UserError(f'config.name={config.name} is no experiment: {", ".join(experiments)}')
    experiments[config.name].train(config, Path(_WORKDIR.value or f'runs/{config.name}'))


def run_evaluation() -> None:
    """Tests the best model of --workdir again."""
    workdir = get_workdir()
    start_jax()
    from covidjax import scan_experiment, slice_experiment
    from covidjax.training.workdir import load_config

    if load_config(workdir).name == 'att2':
        lesions_dir = None if _LESIONS.value is None else Path(_LESIONS.value)
        slice_experiment.evaluate(workdir, lesions_dir, occlusion=_OCCLUSION.value)
    elif _LESIONS.value is not None or _OCCLUSION.value:
        raise UserError(f'--lesions and --occlusion are for slice runs, and {workdir} is of a scan run')
    else:
        scan_experiment.evaluate(workdir)


def run_audit() -> None:
    """Audits --input; exit status 1 if anything is broken."""
    from covidjax import audit

    if len(_INPUT.value) != 1:
        raise UserError('--mode=audit needs one --input=<raw COVIDx-CT directory>')
    if audit.run_audit(Path(_INPUT.value[0]), Path(_WORKDIR.value or 'runs/audit'))['verdict'] == 'broken':
        sys.exit(1)


def run_prediction() -> None:
    """Predicts every --input; exit status 1 if any is refused."""
    workdir = get_workdir()
    if not all(_INPUT.value or ['']):
        raise UserError('--mode=predict needs --input=<DICOM folder or zip, NIfTI, image folder or image>')
    start_jax()
    from covidjax import predict

    output = None if _OUTPUT.value is None else Path(_OUTPUT.value)
    inputs = [Path(path) for path in _INPUT.value]
    if not predict.predict_all(workdir, inputs, output, series=_SERIES.value, force=_FORCE.value):
        sys.exit(1)


def run_export() -> None:
    """Writes the best model of --workdir to --output."""
    from covidjax import export, scan_experiment, slice_experiment
    from covidjax.training.workdir import load_config

    workdir = get_workdir()
    if _OUTPUT.value is None:
        raise UserError('--mode=export needs --output=<file>.stablehlo or .safetensors')
    experiment = slice_experiment if load_config(workdir).name == 'att2' else scan_experiment
    export.export_run(workdir, Path(_OUTPUT.value), experiment.restore_best)


def get_workdir() -> Path:
    """Returns --workdir, which must be there."""
    if _WORKDIR.value is None:
        raise UserError(f'--mode={_MODE.value} needs --workdir=<folder of a finished run>')
    return Path(_WORKDIR.value)


def start_jax() -> None:
    """Sets memory and compilation cache up and connects the processes of a run; before anything is computed."""
    from covidjax.training import compilation, hosts, memory

    memory.keep_freed_memory()
    compilation.use_compilation_cache()
    if _COORDINATOR.value is not None:
        hosts.connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)


MODES = {
    'train': run_training,
    'evaluate': run_evaluation,
    'predict': run_prediction,
    'audit': run_audit,
    'export': run_export,
}
_MODE = flags.DEFINE_enum('mode', 'train', list(MODES), 'What to do.')


def main(argv: list[str]) -> None:
    """Calls the function of the mode."""
    refuse_arguments(argv)
    set_up_log()
    MODES[_MODE.value]()


def run_main(argv: list[str]) -> None:
    """Runs main; a user's mistake is one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM is a Ctrl-C
    try:
        main(argv)
    except UserError as error:
        end(f'error: {error}')
    except KeyboardInterrupt as interrupt:
        saved = str(interrupt)  # said by the training loop, where all processes stop together
        message = f'interrupted: {saved or "nothing new was saved"}; the same command goes on from there'
        sys.exit(message) if saved else end(message)
    except Exception as error:
        if _COORDINATOR.value is None:
            raise
        from covidjax.training.hosts import LOST_PEER, is_lost_peer

        end(LOST_PEER if is_lost_peer(error) else traceback.format_exc())


def end(message: str) -> None:
    """Ends the process with a message on stderr and exit status 1."""
    if _COORDINATOR.value is None:
        sys.exit(message)
    from covidjax.training.hosts import end_process

    end_process(message)


if __name__ == '__main__':
    app.run(run_main, flags_parser=create_parser(_CONFIG))
