from . import add_model_arguments, add_tree_arguments

ABOUT = "generate with and without FSPAD, check that the tokens are the same, and show the speed of both"


def add_arguments(parser) -> None:
    add_model_arguments(parser)
    run = parser.add_argument_group("generation")
    run.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="may be repeated")
    run.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens an answer (default: 128)")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answers (default: 0)")
    run.add_argument("--json", dest="json_file", metavar="FILE", help="write the rows of the table here")
    add_tree_arguments(parser)


def run(**options) -> int:
    from fspad_hf.demo import run_demo
    from fspad_hf.runtime import is_exact

    rows = run_demo(**options)
    differs = not all(row["identical"] for row in rows)
    return int(differs and is_exact(options["device"], options["dtype"]))
