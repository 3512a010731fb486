"""The console script, also as `python -m attnctl`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line and exit code 130, also while it is imported."""
    try:
        from attnctl.app.cli import main as run

        run()
    except KeyboardInterrupt:
        print("attnctl: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
