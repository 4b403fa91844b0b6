"""What a draft that knows nothing costs: random weights against plain `generate`, in turns.

python examples/worst_case.py --max-new-tokens 256 --repeats 5
"""

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fspad_hf import FSPADDraftModel
from fspad_hf.demo_target import demo_target


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="path or Hub id (default: the demo's)")
    parser.add_argument("--prompt", default="Tell me a story about a lighthouse keeper and a storm.")
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)

    name = args.target or str(demo_target())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(name)
    target = AutoModelForCausalLM.from_pretrained(name, dtype=getattr(torch, args.dtype)).to(device).eval()
    draft = FSPADDraftModel.from_target(target)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(device)

    def seconds(**extra) -> float:
        began = time.perf_counter()
        target.generate(
            **inputs, do_sample=False, max_new_tokens=args.max_new_tokens, eos_token_id=None, pad_token_id=0, **extra
        )
        return time.perf_counter() - began

    seconds(), seconds(assistant_model=draft)  # costs are measured once, here
    ratios = []
    for number in range(args.repeats):
        plain, fast = seconds(), seconds(assistant_model=draft)
        ratios.append(plain / fast)
        print(f"{number + 1}/{args.repeats}: plain {plain:.2f} s, with the draft {fast:.2f} s, {ratios[-1]:.3f}x")
    print(f"median {statistics.median(ratios):.3f}x")


if __name__ == "__main__":
    main()
