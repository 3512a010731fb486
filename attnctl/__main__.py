"""The console script, also as `python -m attnctl`."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C is one line and exit code 130, also while it is imported."""
    try:
        import attnctl.demos.ui_command  # noqa: F401  # adds its command to those of `cli`
        from attnctl.app import cli

        cli.main()
    except KeyboardInterrupt:
        print("attnctl: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
