"""`python -m qedfs` is the program `qedfs`."""

import sys

from qedfs.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
