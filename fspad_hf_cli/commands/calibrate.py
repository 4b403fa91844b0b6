from . import add_model_arguments

ABOUT = "fit coupled drafting to held-out text; what is a gain goes into the draft's speculation_config.json"


def add_arguments(parser) -> None:
    add_model_arguments(parser, folder=True)
    parser.add_argument(
        "--data",
        required=True,
        nargs="+",
        metavar="NPY",
        help="text that the target wrote at T = 1: token ids [rows, length]",
    )
    parser.add_argument("--rows", type=int, default=48, metavar="N", help="use the last N rows (default: 48)")
    parser.add_argument("--positions", type=int, default=2048, metavar="N", help="draw at N tokens (default: 2048)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")


def run(**options) -> int:
    from fspad_hf.training.coupling import run_calibration

    run_calibration(**options)
    return 0
