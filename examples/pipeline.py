"""An FSPAD draft in a transformers pipeline, given by its path or Hub id.  python examples/pipeline.py"""

import argparse

from transformers import pipeline

import fspad_hf  # noqa: F401  lets transformers load and use FSPAD drafts
from fspad_hf.demo_target import demo_target, released_draft


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="path or Hub id (default: the demo's)")
    parser.add_argument("--draft", help="path or Hub id (default: the released one)")
    parser.add_argument("--prompt", default="Give me three tips for a good night's sleep.")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    args = parser.parse_args(argv)

    generator = pipeline(
        "text-generation",
        model=args.target or str(demo_target()),
        assistant_model=args.draft or str(released_draft()),
        dtype="float32",
    )
    chat = [{"role": "user", "content": args.prompt}]
    answer = generator(chat, max_new_tokens=args.max_new_tokens, do_sample=False, return_full_text=False)
    print(answer[0]["generated_text"])


if __name__ == "__main__":
    main()
