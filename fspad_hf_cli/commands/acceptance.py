from . import add_model_arguments, add_questions_argument

ABOUT = "measure tau on the first turns of Spec-Bench, by exact simulation of the rounds"


def add_arguments(parser) -> None:
    add_model_arguments(parser)
    add_questions_argument(parser)
    parser.add_argument("--per-task", type=int, default=16, metavar="N", help="prompts a task (default: 16)")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="tokens an answer (default: 128)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answers (default: 0)")
    parser.add_argument(
        "--chain", type=int, metavar="K", help="guess K tokens in a row, as vLLM lets a draft do, instead of a tree"
    )
    parser.add_argument("--json", dest="json_file", metavar="FILE", help="write a row for each prompt and mode here")


def run(**options) -> int:
    from fspad_hf.training.acceptance import run_acceptance

    run_acceptance(**options)
    return 0
