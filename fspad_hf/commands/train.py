ABOUT = "train a draft for a target; an interrupted run goes on where it stood"


def add_arguments(parser) -> None:
    parser.add_argument("--target", required=True, metavar="PATH_OR_HUB_ID")
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", required=True, nargs="+", metavar="DATA",
        help="a folder that fspad-hf selfplay wrote, .npy files of token ids [rows, length]; or conversations: "
        ".jsonl, .json or .parquet files, or Hub data set ids",
    )  # fmt: skip
    data.add_argument("--split", default="train", help="of a Hub data set (default: train)")
    data.add_argument(
        "--row-length", type=int, default=1024, help="conversations are packed in rows of so many tokens"
    )
    data.add_argument("--exclude", nargs="+", default=(), metavar="FILE", help="drop conversations with these prompts")
    data.add_argument("--regenerate", action="store_true", help="replace the answers by the target's own")
    data.add_argument("--regenerate-temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    data.add_argument(
        "--regenerate-tokens", type=int, default=512, metavar="N", help="tokens an answer (default: 512)"
    )
    data.add_argument("--regenerate-rows", type=int, default=16, metavar="N", help="answers at once (default: 16)")
    parser.add_argument("--output", dest="output_dir", required=True, metavar="DIR")
    parser.add_argument("--target-name", metavar="HUB_ID", help="the target's name in the draft's config")
    parser.add_argument("--rows", type=int, metavar="N", help="train on N rows (default: all not held out)")
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


def run(**options) -> int:
    from ..runtime import resolve_dtype
    from ..training.run import DataConfig, run_training
    from ..training.trainer import TrainingConfig

    configs = []
    for kind in (TrainingConfig, DataConfig):
        names = kind.__dataclass_fields__.keys() & options.keys()
        configs.append(kind(**{name: options.pop(name) for name in names}))
    config, data = configs
    run_training(config=config, data=data, dtype=resolve_dtype(options.pop("dtype"), "cpu"), **options)
    return 0
