"""Submit a job from a clone: `python launch/submit.py cluster=… key=value …`, the same as `megavit submit`."""

import sys

from megavit.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["submit", *sys.argv[1:]]))
