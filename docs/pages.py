"""What both generators do with what they made: write it where it differs, or say where it does."""

from __future__ import annotations

import sys
from pathlib import Path

from slipstream.core.files import write_text

ROOT = Path(__file__).parent.parent


def renew(made: dict[Path, str], command: str) -> None:
    """Write every file that is out of date; with --check, name them and the command that renews them, and fail."""
    stale = [p for p, text in made.items() if not p.exists() or p.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv:
        names = ", ".join(str(p.relative_to(ROOT)) for p in stale)
        sys.exit(f"out of date, run `{command}`: {names}" if stale else 0)
    for path in stale:
        write_text(path, made[path])
        print("wrote", path.relative_to(ROOT))
