"""`megavit train -m` with runs of a second: python -m tests.train.sweep_driver ARGUMENT …"""

import sys

from megavit.cli.arguments import parse
from megavit.cli.train import TrainArgs
from megavit.errors import ConfigError
from megavit.train.sweep.sweep import run_sweep

if __name__ == "__main__":
    try:
        args, settings = parse("megavit train", TrainArgs, ["-m", *sys.argv[1:]], settings=True)
        program = (sys.executable, "-m", "tests.train.sweep_run")
        code = run_sweep(settings, args.sweep_options(), program=program)
    except ConfigError as error:
        print(f"megavit: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)
