"""A chat in the terminal, streamed; an empty line or Ctrl-D ends it.  python examples/streaming_chat.py"""

import argparse
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from fspad_hf import FSPADDraftModel
from fspad_hf.demo_target import demo_target, released_draft


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="path or Hub id (default: the demo's)")
    parser.add_argument("--draft", help="path or Hub id (default: the released one)")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    args = parser.parse_args(argv)
    target, draft = args.target or str(demo_target()), args.draft or str(released_draft())

    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    draft = FSPADDraftModel.from_pretrained(draft, dtype=torch.float32)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    options = {"do_sample": True, "max_new_tokens": args.max_new_tokens, "return_dict_in_generate": True}

    chat = []
    print("You: ", end="", flush=True)
    while line := sys.stdin.readline().strip():
        chat.append({"role": "user", "content": line})
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, assistant_model=draft, streamer=streamer, **options)
        answer = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        chat.append({"role": "assistant", "content": answer})
        print(f"[tau {output.speculation.tau}]\nYou: ", end="", flush=True)


if __name__ == "__main__":
    main()
