from . import add_model_arguments, add_questions_argument, add_tree_arguments

ABOUT = "Spec-Bench, or your own prompts: FSPAD beside plain generate, compile, prompt lookup and an assistant"


def add_arguments(parser) -> None:
    add_model_arguments(parser, several_drafts=True)
    parser.add_argument("--assistant", metavar="PATH_OR_HUB_ID", help="also run stock assisted generation with it")
    parser.add_argument("--output", required=True, metavar="DIR", help="results.json, report.md and plots; resumed")
    what = parser.add_argument_group("questions")
    what.add_argument("--suite", default="spec-bench", choices=("spec-bench",), help="(default: spec-bench)")
    add_questions_argument(what)
    what.add_argument("--prompts", metavar="FILE", help="own prompts instead: JSON lines with `messages` or `prompt`")
    what.add_argument("--tasks", nargs="+", metavar="TASK", help="only these tasks")
    what.add_argument("--per-task", type=int, metavar="N", help="so many questions a task (default: all)")
    what.add_argument("--turns", type=int, metavar="N", help="so many turns a question (default: all)")
    what.add_argument("--raw-prompts", action="store_true", help="without a chat template")
    run = parser.add_argument_group("generation")
    run.add_argument(
        "--modes", nargs="+", default=["greedy", "sampled"], metavar="MODE", help="greedy, sampled (T = 1)"
    )
    run.add_argument(
        "--methods", nargs="+", default=["compile", "prompt-lookup", "fspad"], metavar="METHOD",
        help="beside plain: compile, prompt-lookup, assistant, fspad (default: all that need no --assistant)",
    )  # fmt: skip
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens a turn (default: 128)")
    run.add_argument("--bit-exact", action="store_true", help="all methods inside fspad_hf.bit_exact")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answers (default: 0)")
    add_tree_arguments(parser)


def run(**options) -> int:
    from fspad_hf.evaluation.run import run_bench

    options.pop("suite")
    results = run_bench(**options)
    return int(results["exact"] and not results["lossless"])
