"""``python -m ebmfast``: the doctor; with arguments, the command line."""

import sys

if __name__ == "__main__":
    if len(sys.argv) > 1:
        from ebmfast.cli import main

        sys.exit(main())
    from ebmfast.doctor import run

    sys.exit(run())
