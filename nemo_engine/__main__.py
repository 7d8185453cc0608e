"""``python -m nemo_engine`` is the ``nemo-engine`` command."""

import sys

from nemo_engine.cli import main

if __name__ == "__main__":
    sys.exit(main())
