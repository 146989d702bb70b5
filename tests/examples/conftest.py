"""The example scripts import each other as siblings, as they do when run by path; so do these tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
