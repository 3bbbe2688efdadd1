"""The command `groundup`, also as `python -m groundup`."""

import sys

if sys.argv[1:2] == ["env"]:  # the environment stage answers at once, and where nothing is installed: without the rest of groundup

    def main() -> int:
        from groundup.env.cli import main as environment

        return environment(sys.argv[2:])

else:
    from groundup.cli import main

if __name__ == "__main__":
    sys.exit(main())
