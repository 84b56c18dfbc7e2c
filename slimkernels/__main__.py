"""`python -m slimkernels` is the `slimkernels` command of the interpreter that runs it."""

import sys

from slimkernels.scripts.main import main

if __name__ == "__main__":
    sys.exit(main())
