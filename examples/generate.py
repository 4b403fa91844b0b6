"""One prompt, plain and with an FSPAD draft: the same tokens, sooner.  python examples/generate.py --prompt "..." """

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fspad_hf import FSPADDraftModel  # importing fspad_hf is all that `generate` needs to take the draft
from fspad_hf.demo_target import demo_target, released_draft


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="path or Hub id (default: the demo's)")
    parser.add_argument("--draft", help="path or Hub id (default: the released one)")
    parser.add_argument("--prompt", default="Explain why the sky is blue, in simple words.")
    parser.add_argument("--max-new-tokens", type=int, default=100)
    args = parser.parse_args(argv)
    target, draft = args.target or str(demo_target()), args.draft or str(released_draft())

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    draft = FSPADDraftModel.from_pretrained(draft, dtype=torch.float32)
    chat = [{"role": "user", "content": args.prompt}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    for assistant_model in (None, draft):
        torch.manual_seed(0)
        start = time.perf_counter()
        output = model.generate(
            **inputs,
            assistant_model=assistant_model,
            do_sample=True,
            max_new_tokens=args.max_new_tokens,
            return_dict_in_generate=True,
        )
        seconds = time.perf_counter() - start
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        tau = f", tau {output.speculation.tau}" if assistant_model is not None else ""
        print(f"--- {len(new)} tokens in {seconds:.1f} s{tau}")
        print(tokenizer.decode(new, skip_special_tokens=True))


if __name__ == "__main__":
    main()
