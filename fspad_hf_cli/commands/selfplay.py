ABOUT = "let the target write its own training data: it asks itself questions and answers them"


def add_arguments(parser) -> None:
    parser.add_argument("--target", required=True, metavar="PATH_OR_HUB_ID")
    parser.add_argument("--output", required=True, metavar="DIR", help="shards and manifest.json; taken up if begun")
    parser.add_argument("--rows", type=int, default=1024, metavar="N", help="keep at least N rows (default: 1024)")
    parser.add_argument("--row-length", type=int, default=1024, metavar="N", help="tokens a row (default: 1024)")
    parser.add_argument(
        "--batch-rows", type=int, default=32, metavar="N", help="rows at once, and a shard (default: 32)"
    )
    parser.add_argument(
        "--temperatures", type=float, nargs="+", default=(0.0, 0.7, 1.0), metavar="T",
        help="of the answers, row by row in turn (default: 0 0.7 1)",
    )  # fmt: skip
    parser.add_argument("--user-temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--exclude", nargs="+", default=(), metavar="FILE",
        help="drop rows that hold one of these prompts: Spec-Bench's question.jsonl, or texts of one prompt a line",
    )  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    parser.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on the CPU, else bfloat16)")
    parser.add_argument("--no-graph", dest="graph", action="store_false", help="capture no CUDA graph")


def run(**options) -> int:
    from fspad_hf.training.selfplay import SelfplayConfig, run_selfplay

    names = SelfplayConfig.__dataclass_fields__.keys() & options.keys()
    run_selfplay(config=SelfplayConfig(**{name: options.pop(name) for name in names}), **options)
    return 0
