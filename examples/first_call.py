"""What a process takes for its first two answers, with a draft or without.  python examples/first_call.py --plain"""

import argparse
import time

from fspad_hf import FSPADDraftModel
from fspad_hf.demo_target import demo_target, released_draft
from fspad_hf.runtime import resolve_dtype


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plain", action="store_true", help="without the draft")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    args = parser.parse_args(argv)

    dtype = resolve_dtype(args.dtype, "cpu")
    model, tokenizer, draft = FSPADDraftModel.load_pair(released_draft(), target=demo_target(), dtype=dtype)
    chat = [{"role": "user", "content": "Why is the sky blue?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    for call in ("first", "second"):
        start = time.perf_counter()
        output = model.generate(
            **inputs, assistant_model=None if args.plain else draft, max_new_tokens=args.max_new_tokens
        )
        seconds, new = time.perf_counter() - start, output.shape[1] - inputs["input_ids"].shape[1]
        print(f"{call} call: {new} tokens in {seconds:.2f} s")


if __name__ == "__main__":
    main()
