"""
Plain vLLM beside vLLM with a draft, on the same questions: speed, acceptance, and whether the answers are the same.

    python benchmarks/serving.py --target DIR_OR_HUB_ID --draft DIR_OR_HUB_ID --json serving.json

Each engine runs in a process of its own. It keeps as many requests running as `--concurrency` says, one number after
the other. Needs vLLM and this package, see docs/serving.md.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fspad_hf.evaluation.spec_bench import read_questions

COUNTED = {"num_drafts": "rounds", "num_accepted_tokens_per_pos": "accepted"}  # of vLLM's spec_decode metrics


def main(argv: list[str] | None = None) -> dict:
    args = make_parser().parse_args(argv)
    if args.engine:
        return run_engine(args)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for engine in ("plain", "draft"):
            file = Path(folder) / "engine.json"
            words = sys.argv[1:] if argv is None else argv
            subprocess.run([sys.executable, __file__, *words, "--engine", engine, "--json", str(file)], check=True)
            results[engine] = json.loads(file.read_text())
    for at, plain in results["plain"].items():
        fast = results["draft"][at]
        same = sum(a == b for a, b in zip(plain["answers"], fast["answers"], strict=True))
        speed = [sum(map(len, one["answers"])) / one["seconds"] for one in (plain, fast)]
        shares = [count / fast["rounds"] for count in fast["accepted"]]
        print(
            f"{at} at once: plain {speed[0]:.1f} tok/s, with the draft {speed[1]:.1f} ({speed[1] / speed[0]:.2f}x), "
            f"{1 + sum(shares):.2f} tokens a round, accepted by position "
            f"{' '.join(f'{share:.3f}' for share in shares)}, {same} of {len(plain['answers'])} answers identical"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1))
    return results


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--questions", help="Spec-Bench's question.jsonl (default: downloaded)")
    parser.add_argument("--per-task", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--num-speculative-tokens", type=int, default=4)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--enforce-eager", action="store_true", help="without torch.compile")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--engine", choices=("plain", "draft"), help=argparse.SUPPRESS)
    return parser


def run_engine(args: argparse.Namespace) -> dict:
    """Asks one engine all questions at each concurrency; writes `{concurrency: {answers, seconds, ...}}`."""
    from vllm import LLM, SamplingParams

    drafted = {"method": "eagle", "model": args.draft, "num_speculative_tokens": args.num_speculative_tokens}
    llm = LLM(
        args.target, dtype=args.dtype, enforce_eager=args.enforce_eager, max_num_seqs=max(args.concurrency),
        speculative_config=drafted if args.engine == "draft" else None, disable_log_stats=False,
        enable_prefix_caching=False,  # or the second concurrency would find the first one's prompts
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=args.max_new_tokens)
    chats = [[{"role": "user", "content": q.turns[0]}] for q in read_questions(args.questions, args.per_task)]
    template = llm.get_tokenizer().apply_chat_template
    prompts = [template(chat, add_generation_prompt=True, return_dict=True)["input_ids"] for chat in chats]
    serve(llm, prompts[: max(args.concurrency)], params, max(args.concurrency))  # compiles, and warms up
    results = {}
    for at_once in args.concurrency:
        before, began = counts(llm), time.perf_counter()
        answers = serve(llm, prompts, params, at_once)
        seconds = time.perf_counter() - began
        made = {name: subtract(now, before[name]) for name, now in counts(llm).items()}
        results[at_once] = {"answers": answers, "seconds": seconds, **made}
    Path(args.json).write_text(json.dumps(results))
    return results


def serve(llm, prompts: list[list[int]], params, at_once: int) -> list[list[int]]:
    """The answers to the prompts, `at_once` of them running at any time."""
    engine, waiting, answers = llm.llm_engine, list(enumerate(prompts)), {}
    while waiting or engine.has_unfinished_requests():
        while waiting and engine.get_num_unfinished_requests() < at_once:
            number, prompt = waiting.pop(0)
            engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
    return [answers[number] for number in range(len(prompts))]


def counts(llm) -> dict:
    """What vLLM has counted of its drafts so far."""
    found = {metric.name.removeprefix("vllm:spec_decode_"): metric for metric in llm.get_metrics()}
    known = {ours: found[theirs] for theirs, ours in COUNTED.items() if theirs in found}
    return {name: getattr(metric, "values", None) or metric.value for name, metric in known.items()}


def subtract(now, before):
    return [a - b for a, b in zip(now, before, strict=True)] if isinstance(now, list) else now - before


if __name__ == "__main__":
    main()
