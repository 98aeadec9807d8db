r"""Trains every kind of attention with the same budget and seeds, and compares accuracy, AUC and where it looks.

  python -m experiments.ablation --config=configs/att2.py --output=runs/ablation                 on phantoms
  python -m experiments.ablation --config=configs/att2.py:/data/covidx-ct --output=runs/ablation-ct       on CT
  python -m experiments.ablation --config=configs/att2.py --output=/tmp/ablation --seeds=0 \
      --compatibilities=additive,uniform --combinations=concat \
      --config.train.num_epochs=1 --config.train.steps_per_epoch=5                               a trial

Fields of the config are set as for main.py and hold for all runs. Each run has its own workdir,
<output>/<compatibility>-<combination>/seed<seed>; the same command goes on where it stopped, and with more seeds or
variants trains only what is missing. At the end <output>/ablation.md and ablation.json hold the comparison. Lesions are
looked for in slices of the test split that have a mask in the folder lesion_masks of the raw directory, as phantoms do.
"""

import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from covidjax.cli import create_parser, refuse_arguments, set_up_log
from covidjax.errors import UserError
from covidjax.experiment import ablation
from covidjax.models.att2 import COMBINATIONS
from covidjax.models.attention import COMPATIBILITIES

_CONFIG = config_flags.DEFINE_config_file(
    'config', None, 'configs/att2.py, and after a colon its raw COVIDx-CT directory; without one: phantoms.'
)
_OUTPUT = flags.DEFINE_string('output', 'runs/ablation', 'Folder of all runs and of the comparison.')
_SEEDS = flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds of initial weights, data order and augmentation.')
_COMPATIBILITIES = flags.DEFINE_list('compatibilities', list(COMPATIBILITIES), 'Which of them to train.')
_COMBINATIONS = flags.DEFINE_list('combinations', list(COMBINATIONS), 'Which of them to train.')


def main(argv: list[str]) -> None:
    """Checks the flags, compares and prints."""
    refuse_arguments(argv)
    set_up_log()
    config = _CONFIG.value
    if config is None:
        raise UserError('--config is required: --config=configs/att2.py (python -m experiments.ablation --help)')
    if config.name != 'att2':
        raise UserError(f'--config must be that of the slice experiment, configs/att2.py, not of {config.name!r}')
    for flag, known in ((_COMPATIBILITIES, COMPATIBILITIES), (_COMBINATIONS, COMBINATIONS)):
        unknown = set(flag.value) - set(known)
        if unknown or not flag.value:
            raise UserError(f'--{flag.name} must be some of {",".join(known)}, got {",".join(flag.value)!r}')
    if not _SEEDS.value or not all(seed.isdigit() for seed in _SEEDS.value):
        raise UserError(f'--seeds must be numbers from 0, separated by commas, got {",".join(_SEEDS.value)!r}')
    output = Path(_OUTPUT.value)
    comparison = ablation.compare(
        config, [int(seed) for seed in _SEEDS.value], _COMPATIBILITIES.value, _COMBINATIONS.value, output
    )
    print(ablation.format_report(comparison))
    print(f'{output / "ablation.md"}, {output / "ablation.json"}')


def run_main(argv: list[str]) -> None:
    """Runs main; a user's mistake is one line on stderr and exit status 1."""
    try:
        main(argv)
    except UserError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('interrupted: the same command goes on where it stopped')


if __name__ == '__main__':
    app.run(run_main, flags_parser=create_parser(flags.FLAGS))
