"""Enter a lock again and again, and write down what was seen: python locking.py OUTPUT ENTRIES."""

import os
import sys
from pathlib import Path

from sbp_fast.errors import UserError
from sbp_fast.pipeline.output import locked


def enter(out: Path, entries: int) -> tuple[int, int]:
    """Return the numbers of entries and of those that met another process inside."""
    inside, entered, met = out.with_name("inside"), 0, 0
    while entered < entries:
        try:
            with locked(out):
                try:
                    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                except FileExistsError:
                    met += 1
                inside.unlink(missing_ok=True)
                entered += 1
        except UserError:
            continue
    return entered, met


if __name__ == "__main__":
    print(*enter(Path(sys.argv[1]), int(sys.argv[2])))
