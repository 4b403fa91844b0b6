"""A near tie and two roundings: where an answer in bfloat16 first leaves plain decoding's, drawn.

python examples/near_tie.py --output near-tie.svg
"""

import argparse
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from fspad_hf import FSPADDraftModel
from fspad_hf.demo_target import demo_target, released_draft
from fspad_hf.evaluation.report import INK, make_axes, save_svg
from fspad_hf.evaluation.spec_bench import read_questions


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", help="Spec-Bench's question.jsonl (default: downloaded)")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--output", default="near-tie.svg")
    args = parser.parse_args(argv)
    target, tokenizer, draft = FSPADDraftModel.load_pair(released_draft(), target=demo_target(), dtype=torch.bfloat16)
    for question in read_questions(args.questions, 2):
        chat = [{"role": "user", "content": question.turns[0]}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        wanted = {"max_new_tokens": args.max_new_tokens, "return_dict_in_generate": True, "output_logits": True}
        runs = [target.generate(**inputs, **wanted, do_sample=False, assistant_model=one) for one in (None, draft)]
        prompt = inputs["input_ids"].shape[1]
        answers = [run.sequences[0, prompt:].tolist() for run in runs]
        differing = [i for i, pair in enumerate(zip(*answers, strict=False)) if pair[0] != pair[1]]
        if differing:
            break
    else:
        raise SystemExit("All answers are identical here: ask for longer ones with --max-new-tokens.")
    index = differing[0]
    tokens = [answer[index] for answer in answers]
    true = AutoModelForCausalLM.from_pretrained(str(demo_target()), dtype=torch.bfloat16).float()
    with torch.no_grad():
        exact = true(runs[0].sequences[:, : prompt + index]).logits[0, -1]
    rows = {
        "float32": exact,
        "bfloat16,\none row at a time": runs[0].logits[index][0],
        "bfloat16,\nthe rows of a tree": runs[1].logits[index][0],
    }
    rows = {name: [float(logits[token]) for token in tokens] for name, logits in rows.items()}
    words = [tokenizer.decode([token]) for token in tokens]
    print(f"Token {index + 1} of {question.task} {question.number}: {words} have the logits {rows}.")
    draw(rows, words, args.output)


def draw(rows: dict[str, list[float]], words: list[str], output: str) -> None:
    """A line a forward, and on it the logits of both tokens, between the values that bfloat16 has."""
    values = [value for pair in rows.values() for value in pair]
    step = 2.0 ** (math.floor(math.log2(max(values))) - 7)
    low, high = math.floor(min(values) / step) - 1, math.ceil(max(values) / step) + 1
    figure, axes = make_axes("")
    axes.vlines([i * step for i in range(low, high + 1)], -0.5, len(rows) - 0.5, colors=INK, alpha=0.2, linewidth=1)
    for height, pair in enumerate(reversed(rows.values())):
        for value, word, color, side in zip(pair, words, ("tab:blue", "tab:orange"), (0.13, -0.13), strict=True):
            axes.plot(value, height + side, "o", color=color, markersize=10 if value == max(pair) else 7)
            axes.annotate(repr(word), (value, height + side), (9, -4), textcoords="offset points", color=color)
    axes.set_yticks(range(len(rows)), list(reversed(rows)))
    axes.set_xlabel(f"logit; grey: the values that bfloat16 has here, {step:g} apart", color=INK)
    axes.set_xlim(low * step, high * step)
    save_svg(figure, Path(output), "Logits of two tokens by three forwards, between the values that bfloat16 has")


if __name__ == "__main__":
    main()
