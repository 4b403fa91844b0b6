"""What a user gets who sets nothing: `generate` or a pipeline, with and without a draft, on Spec-Bench questions.

python examples/as_pasted.py --per-task 2 --dtype float32 --draft released
"""

import argparse
import contextlib
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from fspad_hf import FSPADDraftModel, bit_exact
from fspad_hf.demo_target import demo_target, released_draft
from fspad_hf.evaluation.spec_bench import read_questions
from fspad_hf.runtime import resolve_dtype

MODES = {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", help="Spec-Bench's question.jsonl (default: downloaded)")
    parser.add_argument("--per-task", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--draft", choices=["released", "random"], default="released")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--api", choices=["generate", "pipeline"], default="generate")
    parser.add_argument("--bit-exact", action="store_true")
    args = parser.parse_args(argv)

    name, dtype = str(demo_target()), resolve_dtype(args.dtype, "cpu")
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    if args.draft == "released":
        draft = FSPADDraftModel.from_pretrained(released_draft(), dtype=target.dtype)
    else:
        draft = FSPADDraftModel.from_target(target)
    plain = pipeline("text-generation", target, tokenizer=tokenizer)
    fast = pipeline("text-generation", target, tokenizer=tokenizer, assistant_model=draft)

    def answer(assisted: bool, chats: list[list[dict]], options: dict) -> list[list[int]]:
        inputs = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        options = {**options, "max_new_tokens": args.max_new_tokens}
        if args.api == "pipeline":
            told = (fast if assisted else plain)(chats, return_tensors=True, batch_size=len(chats), **options)
            ids = [one[0]["generated_token_ids"] for one in told]
        else:
            ids = target.generate(**inputs, **options, assistant_model=draft if assisted else None).tolist()
        return [up_to_end(row[inputs["input_ids"].shape[1] :]) for row in ids]

    def up_to_end(tokens: list[int]) -> list[int]:
        end = tokenizer.eos_token_id
        return tokens[: tokens.index(end) + 1] if end in tokens else tokens

    questions = read_questions(args.questions, args.per_task)
    chats = [[{"role": "user", "content": question.turns[0]}] for question in questions]
    batches = [chats[start : start + args.batch_size] for start in range(0, len(chats), args.batch_size)]
    held = contextlib.ExitStack()
    if args.bit_exact:
        held.enter_context(bit_exact(target))
    for mode, options in MODES.items():
        seconds, tokens, same = [0.0, 0.0], [0, 0], 0
        for number, batch in enumerate(batches):
            answers = {}
            for assisted in (False, True) if number % 2 else (True, False):
                torch.manual_seed(number)
                began = time.perf_counter()
                answers[assisted] = answer(assisted, batch, options)
                seconds[assisted] += time.perf_counter() - began
                tokens[assisted] += sum(map(len, answers[assisted]))
            same += sum(ours == theirs for ours, theirs in zip(answers[True], answers[False], strict=True))
        speed = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
        print(
            f"{args.api}, {args.draft} draft, {args.dtype}, {mode}: plain {speed[0]:.1f} tok/s, ours {speed[1]:.1f} "
            f"tok/s, {speed[1] / speed[0]:.2f}x, {same} of {len(questions)} identical",
            flush=True,
        )
    held.close()


if __name__ == "__main__":
    main()
