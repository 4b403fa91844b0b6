import os

from . import add_model_arguments, add_tree_arguments

ABOUT = "where a round's time goes, beside what reading the weights takes; also for random weights of any shape"


def add_arguments(parser) -> None:
    add_model_arguments(parser)
    shape = parser.add_argument_group("random weights instead")
    shape.add_argument("--shape", metavar="CONFIG", help="llama-3-8b, a config.json or its folder, or a Hub id")
    shape.add_argument("--tau", type=float, metavar="X", help="tokens a round by decree: a random draft has none")
    shape.add_argument("--rounds", type=int, metavar="N", help="rounds an answer (default: 20)")
    shape.add_argument("--draft-vocab-size", type=int, metavar="N", help="ids that are drafted (default: all)")
    run = parser.add_argument_group("generation")
    run.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="may be repeated")
    run.add_argument("--context", type=int, metavar="N", help="prompt tokens (default: the prompts'; a shape's 512)")
    run.add_argument("--max-new-tokens", type=int, metavar="N", help="tokens an answer (default: 64)")
    run.add_argument("--repeats", type=int, default=3, metavar="N", help="passes over everything (default: 3)")
    run.add_argument(
        "--modes", nargs="+", default=["greedy", "sampled"], metavar="MODE", help="greedy, sampled (T = 1)"
    )
    run.add_argument(
        "--methods", nargs="*", metavar="METHOD",
        help="beside plain and FSPAD: compile, prompt-lookup (default: both; of random weights, compile)",
    )  # fmt: skip
    run.add_argument(
        "--rows", nargs="+", type=int, default=[1, 8, 16, 32, 60], metavar="N",
        help="rows of single verification forwards (default: 1 8 16 32 60)",
    )  # fmt: skip
    run.add_argument("--bit-exact", action="store_true", help="everything inside fspad_hf.bit_exact")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answers (default: 0)")
    run.add_argument("--json", dest="json_file", metavar="FILE", help="write all figures here")
    add_tree_arguments(parser)


def run(**options) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's tracing says on stderr when it begins and ends
    from fspad_hf.evaluation.profile import run_profile

    run_profile(**options)
    return 0
