"""The command line: `fspad-hf COMMAND`."""

import argparse
import importlib
import sys

# modules of fspad_hf.commands, as --help lists them
COMMANDS = (
    "demo", "chat", "explain", "verify", "bench", "profile", "acceptance", "selfplay", "train", "ablate", "calibrate",
    "convert", "push", "export-custom-generate",
)  # fmt: skip
EXTRAS = {"gguf": "demo", "rich": "demo", "accelerate": "train", "datasets": "train", "matplotlib": "bench"}


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Returns:
        The exit status: 0 done, 1 the command found a failure, 2 it could not be run, 130 interrupted.
    """
    arguments = vars(_parser().parse_args(argv))
    command = arguments.pop("command")
    try:
        return command(**arguments)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        return _refuse(error)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get(error.name)
        if extra is None:
            raise
        return _refuse(f"{error} (this command needs more packages: pip install 'fspad_hf[{extra}]')")


def _refuse(error: Exception | str) -> int:
    print(f"fspad-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2


def _parser() -> argparse.ArgumentParser:
    from . import __version__

    parser = argparse.ArgumentParser(
        prog="fspad-hf",
        description="FSPAD: tree speculation for transformers' generate. Same seed, same tokens, faster.",
    )
    parser.add_argument("--version", action="version", version=f"fspad-hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
        about = module.ABOUT
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.set_defaults(command=module.run)
        module.add_arguments(command)
    return parser
