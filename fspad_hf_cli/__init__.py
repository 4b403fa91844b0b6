"""
The command line: `fspad-hf COMMAND`.

A package beside fspad_hf, for Python imports all of fspad_hf, torch and transformers with it, before any module in it:
help, the version and a mistyped command need none of that, and answer at once.
"""

import argparse
import difflib
import importlib
import sys
from importlib import metadata

# modules of fspad_hf_cli.commands, as --help lists them
COMMANDS = (
    "demo", "chat", "explain", "verify", "bench", "profile", "acceptance", "selfplay", "train", "ablate",
    "convert", "push", "export-custom-generate",
)  # fmt: skip
EXTRAS = {"gguf": "demo", "rich": "demo", "accelerate": "train", "datasets": "train", "matplotlib": "bench"}


def main(argv: list[str] | None = None) -> int:
    """
    Runs one command.

    Returns:
        The exit status: 0 done, 1 the command found a failure, 2 it could not be run, 130 interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser()
    name = next((word for word in argv if not word.startswith("-")), None)
    if name is not None and name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        parser.error(f"{name!r} is no command" + (f": did you mean {near[0]!r}?" if near else "; see fspad-hf --help"))
    found, others = parser.parse_known_args(argv)
    arguments = vars(found)
    command = arguments.pop("command")
    if "others" in arguments:  # the command knows more options than its help
        arguments["others"] = others
    elif others:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it makes of a command line has that command's function as `command`."""
    parser = argparse.ArgumentParser(
        prog="fspad-hf",
        description="FSPAD: tree speculation for transformers' generate. Same seed, same tokens, faster.",
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show the version and exit"
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = importlib.import_module(f".commands.{name.replace('-', '_')}", __package__)
        about = module.ABOUT
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.set_defaults(command=module.run)
        module.add_arguments(command)
    return parser


class _Version(argparse.Action):
    """As `action="version"`, but the version is looked up when it is asked for: a bare checkout has no metadata."""

    def __call__(self, parser, namespace, values, option_string=None):
        imported = sys.modules.get("fspad_hf")  # as by `python -m fspad_hf`
        print("fspad-hf", imported.__version__ if imported else metadata.version("fspad_hf"))
        parser.exit()


def _refuse(error: Exception | str) -> int:
    print(f"fspad-hf: error: {' '.join(str(error).split())}", file=sys.stderr)
    return 2
