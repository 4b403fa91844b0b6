"""FSPAD against stock `generate` in a process that never imports fspad_hf, prompt by prompt in turns.

python examples/against_stock.py --questions question.jsonl --per-task 2 --dtype bfloat16
"""

import argparse
import json
import subprocess
import sys
import time

WORKER = "--worker"  # this file again, as one of the two processes


def work(target: str, dtype: str, max_new_tokens: int, draft: str | None = None) -> None:
    """Answers the prompts (JSON lists of ids, a line each) on stdin; one JSON line of ids and seconds for each."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(target, dtype=getattr(torch, dtype)).eval()
    extra = {}
    if draft:
        from fspad_hf import FSPADDraftModel

        extra["assistant_model"] = FSPADDraftModel.from_pretrained(draft, dtype=model.dtype)
    assert draft or "fspad_hf" not in sys.modules
    for line in sys.stdin:
        ids = torch.tensor([json.loads(line)])
        began = time.perf_counter()
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, **extra
        )
        print(json.dumps([output[0, ids.shape[1] :].tolist(), time.perf_counter() - began]), flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", help="path or Hub id (default: the demo's)")
    parser.add_argument("--draft", help="path or Hub id (default: the released one)")
    parser.add_argument("--questions", help="Spec-Bench's question.jsonl (default: downloaded)")
    parser.add_argument("--per-task", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)

    from transformers import AutoTokenizer

    from fspad_hf.demo_target import demo_target, released_draft
    from fspad_hf.evaluation.spec_bench import read_questions

    target, draft = args.target or str(demo_target()), args.draft or str(released_draft())
    tokenizer = AutoTokenizer.from_pretrained(target)
    command = [sys.executable, __file__, WORKER, target, args.dtype, str(args.max_new_tokens)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, *more], **pipes) for more in ([], [draft])]

    def ask(ids: list[int]) -> list[tuple[list[int], float]]:
        answers = []
        for worker in workers:
            worker.stdin.write(json.dumps(ids) + "\n")
            worker.stdin.flush()
            answers.append(json.loads(worker.stdout.readline()))
        return answers

    seconds, tokens, same = [0.0, 0.0], [0, 0], []
    questions = read_questions(args.questions, args.per_task)
    for number, question in enumerate([questions[0], *questions]):
        chat = [*question.opening, {"role": "user", "content": question.turns[0]}]
        answers = ask(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"])
        if not number:
            continue  # warms both up
        for i, (ids, taken) in enumerate(answers):
            seconds[i], tokens[i] = seconds[i] + taken, tokens[i] + len(ids)
        same.append(answers[0][0] == answers[1][0])
        stock, fast = (count / taken for count, taken in zip(tokens, seconds, strict=True))
        print(f"{number}/{len(questions)} {question.task}: so far stock {stock:.1f} tok/s, FSPAD {fast:.1f} tok/s, "
              f"{fast / stock:.2f}x, {sum(same)} of {len(same)} answers identical", flush=True)  # fmt: skip
    for worker in workers:
        worker.stdin.close()
        worker.wait()


if __name__ == "__main__":
    if sys.argv[1:2] == [WORKER]:
        path, precision, length, *rest = sys.argv[2:]
        work(path, precision, int(length), *rest)
    else:
        main()
