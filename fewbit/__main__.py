"""The `fewbit` command, also as `python -m fewbit`."""

from __future__ import annotations

import sys

from fewbit import interrupt


def main() -> int:
    """Run the command line and return its exit status. After an interrupt that is `interrupt.STATUS`, even if the interrupt
    surfaced as another exception."""
    with interrupt.remembered():
        try:
            from fewbit.cli import main as run

            return run()
        except BaseException:
            if not interrupt.came():
                raise
            print("fewbit: interrupted", file=sys.stderr)
            return interrupt.STATUS


if __name__ == "__main__":
    sys.exit(main())
