import sys
import warnings

ABOUT = "convert an EAGLE, EAGLE-2 or official FSPAD checkpoint into a draft for generate"


def add_arguments(parser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder or Hub id with config.json and weights")
    parser.add_argument("--target", required=True, metavar="PATH_OR_HUB_ID", help="the model that it was trained for")
    parser.add_argument("--output", required=True, metavar="DIR", help="where to save the draft")
    parser.add_argument("--target-name", metavar="HUB_ID", help="the target's name in the draft's config")
    parser.add_argument("--allow-pickle", action="store_true", help="read pytorch_model.bin (weights only)")
    parser.add_argument(
        "--strict", action="store_true", help="fail if the checkpoint's embedding is not known to be the target's"
    )


def run(**options) -> int:
    from fspad_hf.conversion import convert_checkpoint

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        done = convert_checkpoint(**options)
    for warning in caught:
        print(f"fspad-hf: warning: {warning.message}", file=sys.stderr)
    config, parameters = done.draft.config, sum(p.numel() for p in done.draft.parameters())
    print(
        f"{done.variant}: feature_sampling={config.feature_sampling}, partial_alignment={config.partial_alignment}, "
        f"fc_bias={config.fc_bias}, attention_bias={config.attention_bias}; {parameters:,} parameters in "
        f"{str(done.draft.dtype).removeprefix('torch.')}, saved in {options['output']}"
    )
    return 0
