import shlex
from argparse import SUPPRESS
from collections.abc import Callable
from pathlib import Path

ABOUT = "train a draft for a target; an interrupted run goes on where it stood; runs under accelerate launch as it is"
REQUIRED = {"target": "--target", "data": "--data", "output_dir": "--output"}


def add_arguments(parser) -> None:
    add(parser, "--target", metavar="PATH_OR_HUB_ID", help="required")
    add(parser, "--output", dest="output_dir", metavar="DIR", help="required")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON of these options; the command line wins")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    data, models, training, watching = add_shared_arguments(parser)

    add(data, "--regenerate", action="store_true", help="replace the answers by the target's own")
    add(data, "--regenerate-temperature", type=float, metavar="T", help="default: 0, greedy")
    add(data, "--regenerate-tokens", type=int, metavar="N", help="tokens an answer (default: 512)")
    add(data, "--regenerate-rows", type=int, metavar="N", help="answers at once (default: 16)")
    add(models, "--start-from", metavar="DRAFT", help="begin with its weights, shape and ids (default: linear start)")
    add(training, "--seed", type=int, metavar="N", help="default: 0")
    add(watching, "--report-to", nargs="+", metavar="TRACKER", help="tensorboard, wandb, trackio, ...")


def add_shared_arguments(parser, required: bool = False) -> tuple:
    """Those that [`take_configs`] reads and `ablate` has, too; their groups."""
    parser.set_defaults(others=[])
    parser.epilog = "All other arguments of transformers.TrainingArguments are taken as well, such as --optim."
    data = parser.add_argument_group("data")
    add(
        data, "--data", nargs="+", metavar="DATA", required=required,
        help="required: a folder that fspad-hf selfplay wrote, .npy files of token ids [rows, length]; or "
        "conversations: .jsonl, .json or .parquet files, or Hub data set ids",
    )  # fmt: skip
    add(data, "--split", help="of a Hub data set (default: train)")
    add(data, "--row-length", type=int, metavar="N", help="tokens a row of packed conversations (default: 1024)")
    add(data, "--rows", type=int, metavar="N", help="train on N rows (default: all not held out)")
    add(data, "--exclude", nargs="+", metavar="FILE", help="drop conversations with these prompts")

    models = parser.add_argument_group("target and draft")
    add(models, "--target-name", metavar="HUB_ID", help="the target's name in the draft's config")
    add(models, "--dtype", help="of the target (default: float32)")
    add(models, "--device-map", metavar="MAP", help="of the target: auto, ... (default: each process's device)")
    add(
        models, "--keep-features", nargs="?", const=True, metavar="DIR",
        help="read the target once: into this folder, or without one into memory (default: at every step)",
    )  # fmt: skip
    add(models, "--shard-target", action="store_true", help="split the target's layers over the processes (FSDP)")
    add(models, "--draft-vocab-size", type=int, metavar="N", help="draft the N most frequent ids (default: 16384)")
    add(models, "--no-linear-start", dest="linear_start", action="store_false", help="start at random weights")

    training = parser.add_argument_group("training")
    add(training, "--num-train-epochs", type=float, metavar="N", help="default: 10")
    add(training, "--max-steps", "--steps", type=int, metavar="N", help="in place of epochs")
    add(training, "--batch-rows", type=int, metavar="N", help="rows an optimiser step, of all processes (default: 8)")
    add(
        training, "--per-device-train-batch-size", "--micro-rows", type=int, metavar="N",
        help="rows a forward (default: 8, or what makes --batch-rows)",
    )  # fmt: skip
    add(training, "--learning-rate", type=float, metavar="LR", help="default: 1e-3")
    add(training, "--lr-scheduler-type", "--schedule", metavar="NAME", help="cosine, linear, ... (default: cosine)")
    add(training, "--warmup-steps", type=float, metavar="N", help="default: 30")
    add(training, "--clip-grad-value", "--clip-value", type=float, metavar="G", help="default: 0.5")
    add(training, "--self-steps", type=int, metavar="N", help="runs of the draft, after the first on its own features")
    add(training, "--self-step-decay", type=float, metavar="D", help="run j weighs D^(j-1) (default: 1)")
    add(training, "--top-k-weight", type=float, metavar="W", help="of the target's first tokens, added (default: 0)")
    add(training, "--top-k", type=int, metavar="N", help="how many tokens those are (default: 10)")
    add(training, "--mixed-precision", choices=("no", "bf16"), help="default: accelerate's, else no")

    watching = parser.add_argument_group("checkpoints, evaluation and reports")
    add(watching, "--eval-steps", "--validate-every", type=int, metavar="N", help="0: at the end (default: 250)")
    add(watching, "--save-steps", "--checkpoint-every", type=int, metavar="N", help="default: 100, and at evaluations")
    add(watching, "--eval-rows", "--validate-rows", type=int, metavar="N", help="held-out, at most (default: 32)")
    add(
        watching,
        "--eval-tokens",
        "--validate-tokens",
        type=int,
        metavar="N",
        help="in simulated rounds (default: 512)",
    )
    add(watching, "--metric-for-best-model", "--best-by", metavar="NAME", help="tau, loss, ... (default: tau)")
    add(watching, "--logging-steps", "--log-every", type=int, metavar="N", help="default: 10")
    return data, models, training, watching


def add(group, *names, **kwargs) -> None:
    """An option without a default: it may be in the --config file instead; defaults are the arguments' own."""
    group.add_argument(*names, default=SUPPRESS, **kwargs)


def run(config: str | None = None, plan: bool = False, **options) -> int:
    return told_once(lambda: _run(config, plan, options))


def told_once(work: Callable[[], int]) -> int:
    """`work`, of whose errors only the main process tells."""
    from accelerate import PartialState

    try:
        return work()
    except (ValueError, OSError, FloatingPointError) as error:
        if not PartialState().is_main_process:
            return 2
        if isinstance(error, FloatingPointError):
            raise ValueError(str(error)) from error
        raise


def take_configs(options: dict, **defaults) -> dict:
    """The arguments of `run_training` that the options mean: `args`, `data`, `dtype`, and the others as they are."""
    import os
    from dataclasses import fields

    from fspad_hf.runtime import resolve_dtype
    from fspad_hf.training.arguments import FSPADTrainingArguments, given_arguments
    from fspad_hf.training.data import DataConfig

    rest = {**defaults, **options}
    rest |= given_arguments(rest.pop("others", ()))
    precision = rest.pop("mixed_precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    rest.setdefault("bf16", precision == "bf16")
    data = DataConfig(**{field.name: rest.pop(field.name) for field in fields(DataConfig) if field.name in rest})
    batch = rest.pop("batch_rows", None)
    known = {field.name for field in fields(FSPADTrainingArguments) if field.init}
    args = FSPADTrainingArguments(**{name: rest.pop(name) for name in known & rest.keys()}).with_batch(batch)
    return {**rest, "args": args, "data": data, "dtype": resolve_dtype(rest.get("dtype"), "cpu")}


def _run(file: str | None, plan: bool, options: dict) -> int:
    import gc

    from accelerate import PartialState

    from fspad_hf.training.arguments import read_arguments_file
    from fspad_hf.training.run import run_training

    if file is not None:
        options = {**read_arguments_file(file), **options}
    if missing := [option for name, option in REQUIRED.items() if not options.get(name)]:
        raise ValueError(f"{', '.join(missing)} is missing: expected it on the command line or in a --config file.")
    arguments = take_configs(options, linear_start=True)
    draft = run_training(plan=plan, **arguments)
    if draft is not None and PartialState().is_main_process:
        folder = arguments["args"].output_dir
        models = ["--target", arguments["target"], "--draft", folder]
        print(f"The draft is in {folder}. Try it, or measure it:")
        print(" ", shlex.join(["fspad-hf", "demo", *models]))
        print(" ", shlex.join(["fspad-hf", "bench", *models, "--per-task", "4", "--output", f"{Path(folder)}-bench"]))
    # Threads of the process group, which a split target holds too, may else outlive the interpreter: it aborts then.
    del draft
    gc.collect()
    PartialState().wait_for_everyone()
    PartialState().destroy_process_group()
    return 0
