"""The commands of `fspad-hf`, a module each.

Each module has `ABOUT` (one line), `add_arguments(parser)` and `run(**options) -> int`, whose exit status is 0 for
done and 1 for a failure found. A module imports what it needs when it runs, so that `--help` needs no extra and no
time.
"""


def add_model_arguments(parser, several_drafts: bool = False):
    """`--target`, `--draft`, `--device` and `--dtype`, as [`fspad_hf.loading.load_models`] takes them."""
    models = parser.add_argument_group("models")
    models.add_argument(
        "--target", metavar="PATH_OR_HUB_ID", help="default: the one that the draft names; SmolLM2-135M from PyPI"
    )
    if several_drafts:
        models.add_argument(
            "--draft", dest="drafts", action="append", metavar="[NAME=]PATH_OR_HUB_ID",
            help="may be repeated; default: the released draft of SmolLM2-135M",
        )  # fmt: skip
    else:
        models.add_argument("--draft", metavar="PATH_OR_HUB_ID", help="default: the released draft of SmolLM2-135M")
    models.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one, else cpu)")
    models.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on the CPU, else bfloat16)")


def add_tree_arguments(parser):
    """`--tree-depth`, `--tree-top-k`, `--tree-nodes`, `--tree-lookup` and `--tree`."""
    tree = parser.add_argument_group("draft tree (default: what the draft's config.json says; on a CPU 2, 3, 5, 8)")
    tree.add_argument("--tree-depth", type=int, metavar="N", help="levels below the root")
    tree.add_argument("--tree-top-k", type=int, metavar="N", help="children of a node, and nodes expanded a level")
    tree.add_argument("--tree-nodes", type=int, metavar="N", help="nodes verified each round")
    tree.add_argument(
        "--tree-lookup", type=int, metavar="N",
        help="verify beside these up to N tokens that followed where the text ended so before",
    )  # fmt: skip
    tree.add_argument(
        "--tree", choices=("fixed", "auto"),
        help="auto: each round's tree is the one, up to that size, that promises most tokens a second",
    )  # fmt: skip


def add_questions_argument(parser):
    """`--questions`, as [`fspad_hf.evaluation.spec_bench.read_questions`] takes it."""
    parser.add_argument("--questions", metavar="FILE", help="Spec-Bench's question.jsonl (default: downloaded once)")
