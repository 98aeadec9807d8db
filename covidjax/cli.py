"""The command line: `covidjax <command> --flag=value ...`, or `python main.py --mode=<command> --flag=value ...`.

A command defines only its own flags, and imports its modules after it has parsed them. So help is immediate, and an
audit of lists does not load jax.
"""

import contextlib
import logging
import os
import select
import shutil
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from absl import app, flags
from absl import logging as absl_logging

import covidjax
from covidjax.errors import UserError

CONFIGS = Path(__file__).parent / 'configs'


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
      name: name without the dashes.
      value: kind of value, for the help; '' for a switch.
      help: description.
    """

    name: str
    value: str
    help: str


class Command(NamedTuple):
    """A command.

    Attributes:
      summary: description for the list of commands.
      example: typical flags.
      flags: all flags of the command.
      run: parsed flags -> None; raises UserError for a mistake of the user.
    """

    summary: str
    example: str
    flags: Sequence[Flag]
    run: Callable[[flags.FlagValues], None]


def train(values: flags.FlagValues) -> None:
    """Runs or resumes the experiment of --config."""
    config = _get_config(values, 'train')
    from covidjax.experiment.runs import EXPERIMENTS
    from covidjax.experiment.workdir import list_folds

    workdir = Path(values.workdir or f'runs/{config.name}')
    if list_folds(workdir):
        raise UserError(f'{workdir} holds a cross-validation: run crossvalidate, or choose another --workdir')
    EXPERIMENTS[config.name].train(config, workdir)


def crossvalidate(values: flags.FlagValues) -> None:
    """Trains the folds of --config and tests them together."""
    config = _get_config(values, 'crossvalidate')
    from covidjax.data.folds import parse_groups
    from covidjax.experiment.crossvalidate import Division, crossvalidate

    if values.by not in (None, 'patient', 'source'):
        raise UserError(f'--by={values.by}: it must be patient or source')
    by = values.by or 'patient'
    if values.groups is not None and by == 'patient':
        raise UserError('--groups is for --by=source')
    if values.folds is not None and by == 'source':
        raise UserError('--folds is for --by=patient; --by=source makes a fold of every source or group')
    division = Division(by, 5 if values.folds is None else values.folds, parse_groups(values.groups or ''))
    crossvalidate(config, Path(values.workdir or f'runs/{config.name}-folds'), division=division, fold=values.fold)


def evaluate(values: flags.FlagValues) -> None:
    """Tests the best model of --workdir again, or, with --data, on other data."""
    workdir = _get_workdir(values, 'evaluate')
    if values.data is not None:
        _evaluate_external(values, workdir)
        return
    if values.split is not None:
        raise UserError('--split is for --data: a run itself is tested on its own test list')
    _start_jax(values)
    from covidjax.experiment.config import load_config
    from covidjax.experiment.runs import EXPERIMENTS
    from covidjax.experiment.workdir import list_folds

    config = load_config(workdir)
    if config.name == 'lesions':
        if values.outlines is not None or values.occlusion:
            raise UserError(f'--outlines and --occlusion are for slice runs, and {workdir} is a lesion run')
        EXPERIMENTS[config.name].evaluate(workdir)
    elif list_folds(workdir):
        if values.outlines is not None or values.occlusion:
            raise UserError(f'--outlines and --occlusion are for single runs: pass --workdir={workdir}/fold_1')
        from covidjax.experiment import crossvalidate

        crossvalidate.evaluate(workdir)
    elif 'extractor' not in config:
        lesions_dir = None if values.outlines is None else Path(values.outlines)
        EXPERIMENTS[config.name].evaluate(workdir, lesions_dir, occlusion=values.occlusion)
    elif values.outlines is not None or values.occlusion:
        raise UserError(f'--outlines and --occlusion are for slice runs, and {workdir} is a scan run')
    else:
        EXPERIMENTS[config.name].evaluate(workdir)


def _evaluate_external(values: flags.FlagValues, workdir: Path) -> None:
    for name in ('outlines', 'occlusion', 'coordinator'):
        if values[name].value:
            raise UserError(f'--{name} is not for --data')
    split = values.split or 'test'
    if split not in ('test', 'all'):
        raise UserError(f'--split={split} must be test or all')
    _start_jax(values)
    from covidjax.experiment.config import load_config

    if load_config(workdir).name == 'lesions':
        from covidjax.experiment.lesions import evaluate_outside

        evaluate_outside(workdir, [Path(name).expanduser() for name in values.data.split(',') if name], split)
        return
    from covidjax.predict.external import evaluate_external

    evaluate_external(workdir, Path(values.data).expanduser(), split)


def predict(values: flags.FlagValues) -> None:
    """Predicts every --input, or every chest CT of --archive; exit status 1 if any is refused."""
    workdir = None if values.workdir is None else Path(values.workdir)
    if values.archive is not None:
        _predict_archive(values, workdir)
        return
    if not all(values.input or ['']):
        raise UserError('predict needs --input=<DICOM folder or zip, NIfTI, image folder or image>, or --archive')
    for name in ('pages', 'shard', 'scheduler'):
        if values[name].value is not None:
            raise UserError(f'--{name} is for --archive')
    from covidjax.predict.ahead import Reader

    windows = _get_windows(values)
    output = None if values.output is None else Path(values.output)
    inputs = [Path(path) for path in values.input]
    options = {'series': values.series, 'force': values.force, 'masks': values.masks, 'windows': windows}
    reader = Reader(workdir, inputs, **options)
    _start_jax(values)
    from covidjax.predict.scan import predict_all

    if values.dicom:
        from covidjax.predict.dicom_results import check_package

        check_package()
    if not predict_all(workdir, inputs, output, dicom=values.dicom, reader=reader, **options):
        sys.exit(1)


def _predict_archive(values: flags.FlagValues, workdir: Path | None) -> None:
    if values.input or values.series is not None or values.masks:
        raise UserError(
            '--archive takes no --input, --series or --masks: it finds every scan and series itself, and writes tables'
        )
    if values.output is None:
        raise UserError('--archive needs --output=<folder for the tables>')
    _start_jax(values)
    from covidjax.predict.archive import predict_archive
    from covidjax.predict.dicom_results import check_package

    if values.dicom:
        check_package()
    all_well = predict_archive(
        workdir,
        Path(values.archive),
        Path(values.output),
        pages=values.pages or 'all',
        shard=values.shard,
        scheduler=values.scheduler,
        force=values.force,
        windows=_get_windows(values),
        dicom=values.dicom,
    )
    if not all_well:
        sys.exit(1)


def _get_windows(values: flags.FlagValues) -> int:
    windows = 3 if values.windows is None else values.windows
    if windows not in (1, 3):
        raise UserError(f'--windows={windows}: it must be 1 or 3')
    return windows


def audit(values: flags.FlagValues) -> None:
    """Audits --input; exit status 1 if anything is broken."""
    from covidjax.audit import run_audit

    if len(values.input) != 1:
        raise UserError('audit needs one --input=<raw COVIDx-CT directory>')
    predictions = None if values.predictions is None else Path(values.predictions)
    if run_audit(Path(values.input[0]), Path(values.workdir or 'runs/audit'), predictions)['verdict'] == 'broken':
        sys.exit(1)


def export(values: flags.FlagValues) -> None:
    """Writes the best model of --workdir to --output."""
    workdir = _get_workdir(values, 'export')
    if values.output is None:
        raise UserError('export needs --output=<file>.stablehlo or .safetensors')
    from covidjax.experiment.export import export_run

    export_run(workdir, Path(values.output))


def serve(values: flags.FlagValues) -> None:
    """Serves a page that predicts scans, until it is stopped."""
    try:
        from covidjax.serve.server import serve
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs the package {error.name}: pip install 'covidjax[serve]'") from error

    serve(
        None if values.workdir is None else Path(values.workdir),
        host=values.host,
        port=values.port,
        token_file=None if values.token_file is None else Path(values.token_file),
        keep_minutes=values.keep_minutes,
        dicom=values.dicom,
    )


def _get_config(values: flags.FlagValues, command: str) -> Any:
    """Returns --config and starts jax."""
    config = values.config
    if config is None:
        raise UserError(f'{command} needs --config=<name or file>; shipped names: {", ".join(list_configs())}')
    _start_jax(values)
    from covidjax.experiment.runs import EXPERIMENTS

    if config.name not in EXPERIMENTS:
        raise UserError(f'unknown experiment config.name={config.name}: choose one of {", ".join(EXPERIMENTS)}')
    return config


def _get_workdir(values: flags.FlagValues, command: str) -> Path:
    if values.workdir is None:
        raise UserError(f'{command} needs --workdir=<folder of a finished run>')
    return Path(values.workdir)


def _start_jax(values: flags.FlagValues) -> None:
    """Sets up memory and the compilation cache and connects the processes; call it before any computation."""
    from covidjax.training import hosts, runtime

    runtime.keep_freed_memory()
    runtime.use_compilation_cache()
    if _get(values, 'coordinator') is not None:
        hosts.connect(values.coordinator, values.num_processes, values.process_id)


def _get(values: flags.FlagValues, name: str) -> Any:
    """Returns the value of a flag, or None if the command has no such flag."""
    return values[name].value if name in values else None


_HOSTS = (
    Flag('coordinator', 'HOST:PORT', "Address of the first process; 'auto' under Slurm, Open MPI, TPU, GKE."),
    Flag('num_processes', 'N', 'Number of processes; with --coordinator=HOST:PORT.'),
    Flag('process_id', 'I', 'Index of this process, from 0; with --coordinator=HOST:PORT.'),
)
COMMANDS = {
    'train': Command(
        'Train, test and report an experiment, or resume it.',
        '--config=att2:/data/covidx-ct --workdir=/tmp/run',
        (
            Flag(
                'config',
                'NAME[:DIR]',
                'A shipped config (att2, lite, seq, lesions) or a file, and the raw COVIDx-CT directory, or of lesions '
                'the folders with masks, separated by commas (default: phantoms). '
                'Any field can be set: --config.train.batch_size=16.',
            ),
            Flag('workdir', 'DIR', 'Folder of the run; default: runs/<name of the config>.'),
            *_HOSTS,
        ),
        train,
    ),
    'crossvalidate': Command(
        'Train folds by patient, test them together, and join them into an ensemble.',
        '--config=lite:/data/my-ct --folds=5 --workdir=/tmp/folds',
        (
            Flag('config', 'NAME[:DIR]', 'As for train. The test list stays held out from all folds.'),
            Flag('workdir', 'DIR', 'Folder of the folds and the ensemble; default: runs/<name of the config>-folds.'),
            Flag('folds', 'N', 'Number of folds, at least 2; default: 5.'),
            Flag('by', 'WHAT', 'patient (default), or source: leave out each source of metadata.csv once.'),
            Flag('groups', 'A;B,C', 'With --by=source: leave out A, then B and C together; default: each source.'),
            Flag('fold', 'K', 'Train only fold K, so that several jobs can share the folds; without it, join them.'),
        ),
        crossvalidate,
    ),
    'evaluate': Command(
        'Test the best model of a run again, or on other data.',
        '--workdir=/tmp/run --data=/data/other-hospital',
        (
            Flag('workdir', 'DIR', 'Folder of the run.'),
            Flag(
                'data',
                'DIR',
                'Other data to test on: a raw directory with any of the three lists, or scans with labels.csv; for a '
                'lesion run, folders with masks, separated by commas. The results go to <workdir>/external/<name>/.',
            ),
            Flag('split', 'WHICH', 'Lists of --data to test on: test (default), or all that there are.'),
            Flag('outlines', 'DIR', 'Slices with outlined lesions to score maps on (slice runs only).'),
            Flag('occlusion', '', 'Score occlusion maps too, which is slow (slice runs only).'),
            *_HOSTS,
        ),
        evaluate,
    ),
    'predict': Command(
        'Predict chest CTs and write a report on each; without --workdir, lungs and lesions only.',
        '--workdir=/tmp/run --input=/scans/1 --input=/scans/2.nii.gz',
        (
            Flag(
                'workdir',
                'DIR',
                'Folder of a finished run; default: the lesion model of this package, which outlines lungs and lesions '
                'and gives no verdict.',
            ),
            Flag('input', 'PATH', 'A scan: DICOM folder or zip, NIfTI, image folder or image. Repeat it for more.'),
            Flag(
                'archive', 'PATH', 'A folder, or a text file of paths: predict every chest CT below it into one table.'
            ),
            Flag(
                'output',
                'DIR',
                'Folder of the reports; default without --archive: <workdir>/predictions/<input name>, or '
                'covidjax-predictions/<input name>.',
            ),
            Flag('pages', 'WHICH', 'Scans of an archive that get a page: all (default), positive or none.'),
            Flag('shard', 'K/N', 'Part K of N of an archive, for arrays of jobs that share --output.'),
            Flag('scheduler', 'ADDRESS', 'tcp://host:port of a Dask scheduler whose workers predict the archive.'),
            Flag(
                'series',
                'NAME',
                'The DICOM series to read, where there are several: its number, and a letter if that is shared.',
            ),
            Flag(
                'windows',
                'N',
                '3 (default): look through two further grey windows, where there are Hounsfield units; a call that '
                'changes is uncertain. 1: do not, which takes half the time of the model.',
            ),
            Flag('masks', '', 'Write masks.nii.gz in the geometry of the scan, and slices with outlines, too.'),
            Flag('force', '', 'Predict even if the input may not be a chest CT; the report says so.'),
            Flag('dicom', '', 'Also write results in DICOM, which name the patient as the scan does.'),
        ),
        predict,
    ),
    'audit': Command(
        'Check whether a dataset can be trusted; lists alone are enough.',
        '--input=/data/covidx-ct',
        (
            Flag('input', 'DIR', 'A raw COVIDx-CT directory, or one of lists only.'),
            Flag('workdir', 'DIR', 'Folder of the report; default: runs/audit.'),
            Flag('predictions', 'FILE', 'predictions.csv of a cross-validation: lists labels that it contradicts.'),
        ),
        audit,
    ),
    'serve': Command(
        'Serve a page that classifies the scans that are dropped on it.',
        '--workdir=/tmp/run',
        (
            Flag('workdir', 'DIR', 'Folder of a finished run; default: the lesion model in this package.'),
            Flag('host', 'ADDRESS', 'Address to listen on; default: 127.0.0.1, for this machine only.'),
            Flag('port', 'N', 'Port to listen on; default: 8765; 0 for a free one.'),
            Flag('token_file', 'FILE', 'File with a secret that clients must send; needed with another --host.'),
            Flag('dicom', '', 'Offer results in DICOM, which name the patient as the scan does.'),
            Flag('keep_minutes', 'N', 'Minutes after which a scan and its results are deleted; default: 30.'),
        ),
        serve,
    ),
    'export': Command(
        'Write the model of a run as one file, for jax alone or for PyTorch.',
        '--workdir=/tmp/run --output=model.stablehlo',
        (
            Flag('workdir', 'DIR', 'Folder of a finished run.'),
            Flag('output', 'FILE', '*.stablehlo, a program that jax alone runs, or *.safetensors, for PyTorch.'),
        ),
        export,
    ),
}
_HELP = ('--help', '-help', '-h')
_SWITCHES, _REPEATED = ('occlusion', 'force', 'masks', 'dicom'), ('input',)
_NUMBERS, _FRACTIONS = ('num_processes', 'process_id', 'folds', 'fold', 'port', 'windows'), ('keep_minutes',)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command that `argv` names (default: `sys.argv`); entry point of `covidjax`."""
    program, *arguments = sys.argv if argv is None else argv
    with allow_closed_output():
        if arguments[:1] == ['help']:
            arguments = [*arguments[1:], '--help']
        name, *rest = [argument for argument in arguments if argument not in _HELP] or ['']
        if not name:
            _show(format_help())
            sys.exit(0 if arguments else 1)
        if name == '--version':
            print(covidjax.__version__)
            return
        if name not in COMMANDS:
            sys.exit(f'error: unknown command {name!r}: choose one of {", ".join(COMMANDS)} (see --help)')
        if len(rest) < len(arguments) - 1:
            _show(format_command_help(name))
        else:
            run_command(name, program, rest)


def _show(text: str) -> None:
    """Prints a text in one piece: with `| head -1`, a second piece may find the pipe closed."""
    sys.stdout.write(f'{text}\n')


@contextlib.contextmanager
def allow_closed_output() -> Iterator[None]:
    """Ends the process without a traceback if its output is a pipe that nobody reads any more (`... | head -1`).

    The exit status is that of a finished command, and 1 otherwise.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # a short output is written only here
    except BrokenPipeError as error:
        if not _is_unread(1):  # another pipe is broken, a worker's for example
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes again when it ends
        ended = error.__context__
        sys.exit(ended.code if isinstance(ended, SystemExit) else 1)


def _is_unread(descriptor: int) -> bool:
    """Returns whether the descriptor is a pipe without a reader."""
    poll = select.poll()
    poll.register(descriptor, 0)  # errors are always reported
    return any(event & select.POLLERR for _, event in poll.poll(0))


def run_command(name: str, program: str, arguments: Sequence[str]) -> NoReturn:
    """Parses the flags of a command and runs it; does not return."""
    # ml_collections reads overrides of config fields from sys.argv.
    try:
        arguments = spell_flags(arguments, [flag.name for flag in COMMANDS[name].flags])
        sys.argv = [program, *resolve_config_names(arguments)]
    except UserError as error:
        sys.exit(f'error: {error}')
    values = flags.FLAGS
    define_flags(COMMANDS[name].flags, values)
    app.run(lambda argv: _run(COMMANDS[name], values, argv), sys.argv, flags_parser=create_parser(values))
    sys.exit()


def define_flags(wanted: Sequence[Flag], values: flags.FlagValues) -> None:
    """Defines the flags of a command."""
    for flag in wanted:
        if flag.name == 'config':
            from ml_collections import config_flags  # imported here: it takes a third of a second

            config_flags.DEFINE_config_file('config', None, flag.help, flag_values=values)
        elif flag.name in _SWITCHES:
            flags.DEFINE_bool(flag.name, False, flag.help, flag_values=values)
        elif flag.name in _NUMBERS:
            flags.DEFINE_integer(flag.name, None, flag.help, flag_values=values)
        elif flag.name in _FRACTIONS:
            flags.DEFINE_float(flag.name, None, flag.help, flag_values=values)
        elif flag.name in _REPEATED:
            flags.DEFINE_multi_string(flag.name, [], flag.help, flag_values=values)
        else:
            flags.DEFINE_string(flag.name, None, flag.help, flag_values=values)


def spell_flags(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Replaces hyphens in the names of flags, as in --token-file, by underscores."""
    spelt = []
    for argument in arguments:
        flag, equals, value = argument.partition('=')
        name = flag.lstrip('-').replace('-', '_')
        spelt.append(f'--{name}{equals}{value}' if flag.startswith('--') and name in names else argument)
    return spelt


def resolve_config_names(arguments: Sequence[str]) -> list[str]:
    """Replaces the name of a shipped config, as in --config=att2:DIR, by the path of its file."""
    resolved = list(arguments)
    for i, argument in enumerate(resolved):
        flag, equals, value = argument.partition('=')
        if flag not in ('--config', '-config'):
            continue
        if not equals and i + 1 < len(resolved):
            resolved[i + 1] = _resolve(resolved[i + 1])
        elif equals:
            resolved[i] = f'{flag}={_resolve(value)}'
    return resolved


def _resolve(value: str) -> str:
    name, colon, raw_dir = value.partition(':')
    if name in list_configs():
        return f'{CONFIGS / name}.py{colon}{raw_dir}'
    if not Path(name).is_file():
        raise UserError(f'--config={name} is neither a shipped config ({", ".join(list_configs())}) nor a file')
    return value


def list_configs() -> list[str]:
    """Returns the names of the shipped configs."""
    return sorted(path.stem for path in CONFIGS.glob('[!_]*.py'))


def create_parser(values: flags.FlagValues) -> Callable[[list[str]], list[str]]:
    """Returns a flag parser for `app.run` that ends the process on an unknown flag or config field."""

    def parse_flags(argv: list[str]) -> list[str]:
        try:
            rest = values(argv)
            config = _get(values, 'config')
            if config is not None:
                config.name  # noqa: B018, a file that can't be loaded raises only at this access
            return rest
        except Exception as error:  # Config overrides raise many types; all come from the command line.
            sys.exit(f'error: {_describe(error)} (see --help)')

    return parse_flags


def _describe(error: Exception) -> str:
    """Returns the message of a parsing error on one line; ml_collections wraps a KeyError for an unknown field."""
    cause = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    if isinstance(cause, KeyError):
        return f'the config has no field {" ".join(str(cause.args[0]).split())}'
    return ' '.join(str(error).split())


def _run(command: Command, values: flags.FlagValues, argv: list[str]) -> None:
    """Runs a command; a user's mistake gives one line on stderr and exit status 1."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # treat SIGTERM as Ctrl-C
    is_distributed = _get(values, 'coordinator') is not None

    def end(message: str) -> NoReturn:
        if not is_distributed:
            sys.exit(message)
        from covidjax.training.hosts import end_process

        end_process(message)

    try:
        refuse_arguments(argv)
        set_up_log()
        command.run(values)
    except UserError as error:
        end(f'error: {error}')
    except KeyboardInterrupt as interrupt:
        saved = str(interrupt)  # set by the training loop, where all processes stop together
        message = f'interrupted: {saved or "nothing new was saved"}; repeat the same command to resume'
        sys.exit(message) if saved else end(message)
    except Exception as error:
        if not is_distributed:
            raise
        from covidjax.training.hosts import LOST_PEER, is_lost_peer

        end(LOST_PEER if is_lost_peer(error) else traceback.format_exc())


def refuse_arguments(argv: list[str]) -> None:
    """Checks that only flags were given.

    Raises:
      UserError: there is a positional argument.
    """
    if len(argv) > 1:
        raise UserError(f'unexpected argument {argv[1]!r}: write every option as --name=value')


def set_up_log() -> None:
    """Shows the project's log messages, and only warnings of libraries."""
    absl_logging.set_verbosity(absl_logging.WARNING)
    absl_logging.get_absl_handler().setFormatter(logging.Formatter('%(asctime)s %(message)s', '%H:%M:%S'))
    logging.getLogger('covidjax').setLevel(logging.INFO)


def format_help() -> str:
    """Returns the list of commands."""
    lines = ['Models that tell normal lungs, pneumonia and COVID-19 apart on chest CT.', '', 'Commands:']
    for name, command in COMMANDS.items():
        lines += [f'  {name:<14}{command.summary}', f'{"":<16}covidjax {name} {command.example}']
    lines += [
        '',
        'covidjax train --config=att2 runs on generated phantoms and needs no data.',
        'covidjax help COMMAND lists the flags of a command.',
        '',
        'Research use only: not a medical device.',
    ]
    return '\n'.join(lines)


def format_command_help(name: str) -> str:
    """Returns the description and the flags of a command."""
    command = COMMANDS[name]
    return '\n'.join([command.summary, '', f'  covidjax {name} {command.example}', '', *_format_flags(command.flags)])


def _format_flags(wanted: Sequence[Flag]) -> list[str]:
    lines, width = [], min(shutil.get_terminal_size().columns, 100)
    for flag in wanted:
        spelt = f'  --{flag.name}' + (f'={flag.value}' if flag.value else '')
        first, *rest = textwrap.wrap(flag.help, width - 28)
        lines += [f'{spelt:<27} {first}', *(f'{"":<28}{line}' for line in rest)]
    return lines


def format_all_flags() -> str:
    """Returns the flags of every command."""
    lines = []
    for name, command in COMMANDS.items():
        lines += [f'{name}: {command.summary}', *_format_flags(command.flags), '']
    return '\n'.join(lines)
