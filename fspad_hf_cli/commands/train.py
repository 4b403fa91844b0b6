import shlex
from argparse import SUPPRESS
from collections.abc import Callable
from pathlib import Path

ABOUT = "train a draft for a target; an interrupted run goes on where it stood; runs under accelerate launch as it is"
REQUIRED = {"target": "--target", "data": "--data", "output_dir": "--output"}
FLAGS = ("keep_features", "linear_start", "regenerate")


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
    add(watching, "--report-to", nargs="+", metavar="TRACKER", help="tensorboard, wandb, ... through accelerate")


def add_shared_arguments(parser, required: bool = False) -> tuple:
    """Those that [`take_configs`] reads and `ablate` has, too; their groups."""
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
    add(models, "--keep-features", action="store_true", help="hold the target's features in memory")
    add(models, "--draft-vocab-size", type=int, metavar="N", help="draft the N most frequent ids (default: all)")
    add(models, "--no-linear-start", dest="linear_start", action="store_false", help="start at random weights")

    training = parser.add_argument_group("training")
    add(training, "--steps", type=int, metavar="N", help="default: 1000")
    add(training, "--batch-rows", type=int, metavar="N", help="rows an optimiser step, of all processes (default: 8)")
    add(training, "--micro-rows", type=int, metavar="N", help="rows a forward, at most (default: 8)")
    add(training, "--learning-rate", type=float, metavar="LR", help="default: 1e-3")
    add(training, "--schedule", choices=("cosine", "linear"), help="after the warm-up (default: cosine)")
    add(training, "--warmup-steps", type=int, metavar="N", help="default: 30")
    add(training, "--clip-value", type=float, metavar="G", help="largest gradient of a weight (default: 0.5)")
    add(training, "--head-sample", type=int, metavar="N", help="sampled softmax: N frequent ids (default: 0, all)")
    add(training, "--head-extra", type=int, metavar="N", help="sampled softmax: N others a step (default: 2048)")
    add(training, "--self-steps", type=int, metavar="N", help="runs of the draft, after the first on its own features")
    add(training, "--self-step-decay", type=float, metavar="D", help="run j weighs D^(j-1) (default: 1)")
    add(training, "--top-k-weight", type=float, metavar="W", help="of the target's first tokens, added (default: 0)")
    add(training, "--top-k", type=int, metavar="N", help="how many tokens those are (default: 10)")
    add(training, "--mixed-precision", choices=("no", "bf16"), help="default: accelerate's, else no")

    watching = parser.add_argument_group("checkpoints, validation and reports")
    add(watching, "--checkpoint-every", type=int, metavar="STEPS", help="default: 100")
    add(watching, "--validate-every", type=int, metavar="STEPS", help="0: at the end alone (default: 500)")
    add(watching, "--validate-rows", type=int, metavar="N", help="held-out rows, at most (default: 32)")
    add(watching, "--validate-tokens", type=int, metavar="N", help="in simulated rounds (default: 512)")
    add(watching, "--best-by", choices=("tau", "loss"), help="which validated weights are saved (default: tau)")
    add(watching, "--coupling-positions", type=int, metavar="N", help="fit coupled drafting (default: 2048; 0: no)")
    add(watching, "--log-every", type=int, metavar="STEPS", help="steps a line when piped (default: 10)")
    return data, models, training, watching


def add(group, *names, **kwargs) -> None:
    """An option without a default: it may be in the --config file instead; defaults are the configs' own."""
    group.add_argument(*names, default=SUPPRESS, **kwargs)


def run(config: str | None = None, plan: bool = False, **options) -> int:
    return told_once(lambda: _run(config, plan, options))


def told_once(work: Callable[[], int]) -> int:
    """`work`, of whose errors only the main process tells."""
    from accelerate import Accelerator

    try:
        return work()
    except (ValueError, OSError, FloatingPointError) as error:
        if not Accelerator(mixed_precision="no").is_main_process:
            return 2
        if isinstance(error, FloatingPointError):
            raise ValueError(str(error)) from error
        raise


def take_configs(options: dict) -> dict:
    """The arguments of `run_training` that the options mean: `config`, `data`, `dtype`, and the others as they are."""
    import os

    from fspad_hf.runtime import resolve_dtype
    from fspad_hf.training.config import DataConfig, TrainingConfig

    rest = {"mixed_precision": os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), **options}
    config, data = (
        kind(**{n: rest.pop(n) for n in kind.__dataclass_fields__ if n in rest})
        for kind in (TrainingConfig, DataConfig)
    )
    return {**rest, "config": config, "data": data, "dtype": resolve_dtype(rest.get("dtype"), "cpu")}


def _run(file: str | None, plan: bool, options: dict) -> int:
    from accelerate import PartialState

    from fspad_hf.training.config import DataConfig, TrainingConfig, read_config_file
    from fspad_hf.training.run import run_training

    kinds = (TrainingConfig, DataConfig)
    others = {"target", "rows", "target_name", "dtype", "device_map", "draft_vocab_size", "keep_features"}
    others |= {"linear_start", "draft_overrides", "start_from"}
    if file is not None:
        known = {*others, "output"}.union(*(kind.__dataclass_fields__ for kind in kinds))
        given = read_config_file(file, known)
        if "output" in given:
            given.setdefault("output_dir", given.pop("output"))
        options = {**given, **options}
    if missing := [option for name, option in REQUIRED.items() if not options.get(name)]:
        raise ValueError(f"{', '.join(missing)} is missing: expected it on the command line or in a --config file.")
    for name in FLAGS:
        if not isinstance(options.get(name, False), bool):
            raise ValueError(f"{name}={options[name]!r}: expected true or false.")
    arguments = take_configs(options)
    draft = run_training(plan=plan, **arguments)
    if draft is not None and PartialState().is_main_process:
        folder = arguments["config"].output_dir
        models = ["--target", arguments["target"], "--draft", folder]
        print(f"The draft is in {folder}. Try it, or measure it:")
        print(" ", shlex.join(["fspad-hf", "demo", *models]))
        print(" ", shlex.join(["fspad-hf", "bench", *models, "--per-task", "4", "--output", f"{Path(folder)}-bench"]))
    PartialState().destroy_process_group()  # whose threads may else outlive the interpreter, which aborts then
    return 0
