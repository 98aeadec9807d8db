r"""Trains and tests models that tell normal lungs, pneumonia and COVID-19 apart on chest CT.

A demo on generated phantoms: slices, or slices and then scans
  python main.py --config=configs/att2.py --workdir=/tmp/run
  python main.py --config=configs/seq.py --workdir=/tmp/seq

The paper's two experiments; after the colon, the raw COVIDx-CT directory
  python main.py --config=configs/att2.py:/data/covidx-ct --workdir=/tmp/run
  python main.py --config=configs/seq.py:/data/covidx-ct \
    --config.extractor=/tmp/run --workdir=/tmp/seq

Other modes: --mode=train|crossvalidate|evaluate|predict|audit|serve|export
  python main.py --mode=crossvalidate --config=configs/lite.py:/data/my-ct \
    --folds=5 --workdir=/tmp/folds
  python main.py --mode=audit --input=/data/covidx-ct
  python main.py --mode=evaluate --workdir=/tmp/run
  python main.py --mode=predict --workdir=/tmp/run --input=/scans/1 \
    --input=/scans/2.nii.gz
  python main.py --mode=serve --workdir=/tmp/run
  python main.py --mode=export --workdir=/tmp/run --output=model.stablehlo

A training command that is repeated in its workdir resumes; SIGTERM and Ctrl-C
save after the next step. All devices of a host are used; to use several hosts,
start the command on each of them with --coordinator.
"""

import sys

from covidjax import cli


def read_mode(arguments: list[str]) -> tuple[str, list[str]]:
    """Returns the value of --mode, by default train, and the other arguments."""
    mode, rest = 'train', []
    pending = iter(arguments)
    for argument in pending:
        flag, equals, value = argument.partition('=')
        if flag in ('--mode', '-mode'):
            mode = value if equals else next(pending, '')
        else:
            rest.append(argument)
    return mode, rest


def main() -> None:
    """Runs the command that --mode names."""
    mode, arguments = read_mode(sys.argv[1:])
    if any(argument in ('--help', '-help', '-h') for argument in arguments):
        with cli.allow_closed_output():
            print(f'{__doc__}\n{cli.format_all_flags()}')
    else:
        cli.main([sys.argv[0], mode, *arguments])


if __name__ == '__main__':
    main()
