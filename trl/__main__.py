"""`python -m trl` is the command `trl`."""

import sys

from trl.cli import main

if __name__ == "__main__":
    sys.exit(main())
