"""The `fewbit` command, also as `python -m fewbit`."""

from __future__ import annotations

import sys

from fewbit.interrupt import came, heard


def main() -> int:
    """Run the command line of this process; its exit status, 130 after an interrupt, also while modules are imported."""
    with heard():
        try:
            from fewbit.cli import main as run

            return run()
        except BaseException:
            if not came():
                raise
            print("fewbit: interrupted", file=sys.stderr)
            return 130


if __name__ == "__main__":
    sys.exit(main())
