import argparse

from . import add_questions_argument
from .train import add_shared_arguments, take_configs, told_once

ABOUT = "train FSPAD and its ablations (EAGLE-2 among them) alike, and compare their tau"


def add_arguments(parser) -> None:
    parser.add_argument("--target", required=True, metavar="PATH_OR_HUB_ID")
    add_questions_argument(parser)
    parser.add_argument(
        "--output", dest="output_dir", required=True, metavar="DIR", help="drafts, figures, report; taken up if begun"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=(0, 1), metavar="N", help="of FSPAD and EAGLE-2 (default: 0 1)"
    )
    parser.add_argument(
        "--between", nargs="*", default=argparse.SUPPRESS, metavar="NAME",
        help="drafts with one part: no-feature-sampling, no-partial-alignment, or none (default: both)",
    )  # fmt: skip
    parser.add_argument("--per-task", type=int, default=40, metavar="N", help="prompts a task (default: 40)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens an answer (default: 128)")
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")
    add_shared_arguments(parser, required=True)


def run(**options) -> int:
    from fspad_hf.training.ablation import run_ablation

    def work() -> int:
        run_ablation(**take_configs(options, linear_start=True))
        return 0

    return told_once(work)
