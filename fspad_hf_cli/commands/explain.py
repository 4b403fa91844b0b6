from . import add_model_arguments, add_tree_arguments

ABOUT = "draw the tree of each round of an answer: what was guessed, accepted and rejected"


def add_arguments(parser) -> None:
    parser.add_argument("prompt", metavar="PROMPT", help="the user's message")
    parser.add_argument("--output", required=True, metavar="FILE", help="a picture (.svg) or a page (.html)")
    parser.add_argument("--rounds", type=int, metavar="N", help="draw the first N (default: 3 in .svg, all in .html)")
    add_model_arguments(parser)
    run = parser.add_argument_group("generation")
    run.add_argument("--max-new-tokens", type=int, default=32, metavar="N", help="tokens of the answer (default: 32)")
    mode = run.add_mutually_exclusive_group()
    mode.add_argument("--greedy", dest="sampled", action="store_false", help="do not sample (the default)")
    mode.add_argument("--sampled", dest="sampled", action="store_true", help="sample at T = 1 from all tokens")
    run.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampled answer (default: 0)")
    parser.set_defaults(sampled=False)
    add_tree_arguments(parser)


def run(**options) -> int:
    from fspad_hf.explain import run_explain

    made = run_explain(**options)
    count, tokens = len(made.rounds), sum(len(one.emitted) for one in made.rounds)
    print(f"Written to {options['output']}: {count} rounds for {tokens} tokens (tau {tokens / count:.2f}).")
    return 0
