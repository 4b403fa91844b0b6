from argparse import SUPPRESS

ABOUT = "train a draft for a target; an interrupted run goes on where it stood; runs under accelerate launch as it is"
REQUIRED = {"target": "--target", "data": "--data", "output_dir": "--output"}
FLAGS = ("keep_features", "linear_start", "regenerate")


def add_arguments(parser) -> None:
    # No defaults here: an option that was not given may be in the --config file; defaults are the configs' own.
    def add(group, *names, **kwargs):
        group.add_argument(*names, default=SUPPRESS, **kwargs)

    add(parser, "--target", metavar="PATH_OR_HUB_ID", help="required")
    add(parser, "--output", dest="output_dir", metavar="DIR", help="required")
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON of these options; the command line wins")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")

    data = parser.add_argument_group("data")
    add(
        data, "--data", nargs="+", metavar="DATA",
        help="required: a folder that fspad-hf selfplay wrote, .npy files of token ids [rows, length]; or "
        "conversations: .jsonl, .json or .parquet files, or Hub data set ids",
    )  # fmt: skip
    add(data, "--split", help="of a Hub data set (default: train)")
    add(data, "--row-length", type=int, metavar="N", help="tokens a row of packed conversations (default: 1024)")
    add(data, "--rows", type=int, metavar="N", help="train on N rows (default: all not held out)")
    add(data, "--exclude", nargs="+", metavar="FILE", help="drop conversations with these prompts")
    add(data, "--regenerate", action="store_true", help="replace the answers by the target's own")
    add(data, "--regenerate-temperature", type=float, metavar="T", help="default: 0, greedy")
    add(data, "--regenerate-tokens", type=int, metavar="N", help="tokens an answer (default: 512)")
    add(data, "--regenerate-rows", type=int, metavar="N", help="answers at once (default: 16)")

    models = parser.add_argument_group("target and draft")
    add(models, "--target-name", metavar="HUB_ID", help="the target's name in the draft's config")
    add(models, "--dtype", help="of the target (default: float32)")
    add(models, "--device-map", metavar="MAP", help="of the target: auto, ... (default: each process's device)")
    add(models, "--keep-features", action="store_true", help="hold the target's features in memory")
    add(models, "--draft-vocab-size", type=int, metavar="N", help="draft the N most frequent ids (default: all)")
    add(models, "--start-from", metavar="DRAFT", help="begin with its weights, shape and ids (default: linear start)")
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
    add(training, "--mixed-precision", choices=("no", "bf16"), help="default: accelerate's, else no")
    add(training, "--seed", type=int, metavar="N", help="default: 0")

    watching = parser.add_argument_group("checkpoints, validation and reports")
    add(watching, "--checkpoint-every", type=int, metavar="STEPS", help="default: 100")
    add(watching, "--validate-every", type=int, metavar="STEPS", help="0: at the end alone (default: 500)")
    add(watching, "--validate-rows", type=int, metavar="N", help="held-out rows, at most (default: 32)")
    add(watching, "--validate-tokens", type=int, metavar="N", help="in simulated rounds (default: 512)")
    add(watching, "--best-by", choices=("tau", "loss"), help="which validated weights are saved (default: tau)")
    add(watching, "--coupling-positions", type=int, metavar="N", help="fit coupled drafting (default: 2048; 0: no)")
    add(watching, "--log-every", type=int, metavar="STEPS", help="steps a line when piped (default: 10)")
    add(watching, "--report-to", nargs="+", metavar="TRACKER", help="tensorboard, wandb, ... through accelerate")


def run(config: str | None = None, plan: bool = False, **options) -> int:
    from accelerate import Accelerator

    try:
        return _run(config, plan, options)
    except (ValueError, OSError, FloatingPointError) as error:
        if not Accelerator(mixed_precision="no").is_main_process:
            return 2  # the main process tells
        if isinstance(error, FloatingPointError):
            raise ValueError(str(error)) from error
        raise


def _run(file: str | None, plan: bool, options: dict) -> int:
    import os

    from ..runtime import resolve_dtype
    from ..training.config import DataConfig, TrainingConfig, read_config_file
    from ..training.run import run_training

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
    options.setdefault("mixed_precision", os.environ.get("ACCELERATE_MIXED_PRECISION", "no"))
    training, data = (kind(**{n: options.pop(n) for n in kind.__dataclass_fields__ if n in options}) for kind in kinds)
    dtype = resolve_dtype(options.pop("dtype", None), "cpu")
    run_training(config=training, data=data, dtype=dtype, plan=plan, **options)
    return 0
