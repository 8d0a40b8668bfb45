"""`python -m ekfac_func COMMAND`."""

import argparse
from collections.abc import Sequence

from .study import command as study
from .train import command as train


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the options and run the command that they name."""
    parser = argparse.ArgumentParser(prog="python -m ekfac_func", description="Natural gradients on torch.func.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    train.add(commands)
    study.add(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except KeyboardInterrupt:  # while data are read, or for the second time: the last checkpoint is whole
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
