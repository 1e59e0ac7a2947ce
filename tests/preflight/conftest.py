"""The tests of the host's probe call scripts/run.py, whose modules import one another by their names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
