"""Generated pages are what the mixers' files say now."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["generate", "policies"])
def test_docs_are_up_to_date(name: str):
    script = Path(__file__).parents[2] / "docs" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
