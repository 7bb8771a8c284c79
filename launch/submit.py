"""`python launch/submit.py cluster=… key=value …`, from a clone; `megavit submit` is the same where it is installed."""

import sys

from megavit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
