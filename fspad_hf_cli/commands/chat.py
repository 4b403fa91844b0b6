from . import add_model_arguments, add_tree_arguments

ABOUT = "chat with a model in the terminal, with tau and the speed of each answer"


def add_arguments(parser) -> None:
    add_model_arguments(parser)
    run = parser.add_argument_group("generation (default: the target's generation_config)")
    run.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens an answer (default: 256)")
    run.add_argument("--temperature", type=float, metavar="T", help="sample at this temperature (0: greedy)")
    run.add_argument("--top-p", type=float, metavar="P", help="sample from the most likely tokens up to P (1: all)")
    run.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (0: all)")
    run.add_argument("--greedy", action="store_true", help="do not sample")
    run.add_argument("--seed", type=int, metavar="N", help="of the conversation's samples")
    run.add_argument("--system", metavar="TEXT", help="the system message")
    add_tree_arguments(parser)


def run(**options) -> int:
    from fspad_hf.chat import run_chat

    run_chat(**options)
    return 0
