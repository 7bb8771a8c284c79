"""`python -m megavit`: the command `megavit`."""

import sys

from megavit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
