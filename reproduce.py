"""`python reproduce.py FILE.yaml` in a checkout; installed, the same is `python -m dls_comparison FILE.yaml`."""

import sys

from datasets_scripts.command_line import run_command
from dls_comparison.__main__ import ComparisonSettings, main

if __name__ == "__main__":
    sys.exit(run_command(main, ComparisonSettings.parsed()))
