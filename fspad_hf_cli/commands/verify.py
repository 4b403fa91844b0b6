from . import add_model_arguments, add_tree_arguments

ABOUT = "check that FSPAD gives plain generate's tokens, over many settings, seeds and prompts"


def add_arguments(parser) -> None:
    add_model_arguments(parser)
    run = parser.add_argument_group("generation")
    run.add_argument("--prompt", dest="prompts", action="append", metavar="TEXT", help="may be repeated")
    run.add_argument("--seeds", type=int, default=2, metavar="N", help="of each sampled setting (default: 2)")
    run.add_argument("--max-new-tokens", type=int, default=48, metavar="N", help="tokens an answer (default: 48)")
    run.add_argument(
        "--long-prompt", type=int, metavar="N", help="tokens (default: past the sliding window, or a quarter context)"
    )
    run.add_argument(
        "--bit-exact", action="store_true", help="inside fspad_hf.bit_exact: compare all bits of each layer's output"
    )
    run.add_argument("--json", dest="json_file", metavar="FILE", help="write a row for each setting here")
    add_tree_arguments(parser)


def run(**options) -> int:
    from fspad_hf.evaluation.verify import run_verify

    return 0 if run_verify(**options) else 1
