"""
What this project does on a GPU, in twelve minutes and one command: correctness first, then speed, then training.

    python benchmarks/gpu.py --jobs eager graphs speed-8b            # no weights needed
    python benchmarks/gpu.py --target DIR --ids DIR                  # everything
    python benchmarks/gpu.py --rehearse                              # the same jobs, tiny, on a CPU

It needs torch, transformers and this checkout, nothing installed. Each job (see gpu_jobs.py) runs in a process of its
own with a time limit of its own; its JSON is written the moment it ends, so whatever happens to one job, the others'
figures are there. docs/benchmarks.md says more.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_jobs.py"
TAIL = 40  # lines of a job's output that its JSON keeps
REHEARSAL_SECONDS = 120  # the most a job may take when it is rehearsed


@dataclass(frozen=True)
class Job:
    """
    Args:
        about: one line, for the table.
        seconds: its time limit.
        gib: GPU memory that it needs.
        needs: options without which it cannot run.
        modules: packages beyond torch and transformers.
        on_cpu: what `--rehearse` cannot try, if it cannot; completes "not rehearsed, because".
    """

    about: str
    seconds: int
    gib: float = 2
    needs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    on_cpu: str | None = None


NO_GRAPHS = "a CPU has no CUDA graphs"
JOBS = {  # in the order in which they say most soonest
    "eager": Job("tokens against plain generate, eager rounds", 120),
    "graphs": Job("tokens against plain generate, rounds as CUDA graphs", 200, on_cpu=NO_GRAPHS),
    "tests": Job("tests/generation/test_cuda.py", 120, modules=("pytest",), on_cpu="they need a CUDA device"),
    "speed-8b": Job("speed at the shape of Llama-3-8B, random weights, tau 4 by decree", 150, gib=24),
    "selfplay-tests": Job("tests/training/test_selfplay.py -k graph", 40, modules=("pytest",), on_cpu=NO_GRAPHS),
    "speed": Job("speed of the target with its draft, greedy and sampled, bf16 and fp32", 150, needs=("target",)),
    "kernels": Job("the kernels of bit_exact beside cuBLAS and sdpa", 60, gib=4, modules=("triton",)),
    "bit-exact": Job("answers inside bit_exact, bf16", 150, needs=("target",), modules=("triton",)),
    "train": Job("compare recipes, train a draft, then FSPAD's parts; tau", 600, gib=64, needs=("target", "ids")),
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    try:
        chosen = choose(options)
        options.out.mkdir(parents=True, exist_ok=True)
        if options.rehearse:
            prepare_rehearsal(options)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in ("pytest", "gguf"):
        if importlib.util.find_spec(name) is None:
            print(f"{name} is not installed: what needs it is left out.", flush=True)
    deadline, results = time.monotonic() + options.minutes * 60, []
    for name in chosen:
        result = run_job(name, options, deadline - time.monotonic())
        write_json(options.out / f"{name}.json", result)
        results.append(result)
        print(line_of(result), flush=True)
    table = "\n".join(line_of(result) for result in results)
    write_json(options.out / "summary.json", [{k: v for k, v in r.items() if k != "output"} for r in results])
    print(f"\n{table}\n\nOne JSON a job is in {options.out}", flush=True)
    return int(any(result["status"] in ("failed", "timeout") for result in results))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    jobs = "\n".join(f"  {name:15} {job.about} ({job.seconds} s at most)" for name, job in JOBS.items())
    parser = argparse.ArgumentParser(
        description="Correctness, speed and training of fspad_hf on a GPU, job by job within a time limit.",
        epilog=f"jobs:\n{jobs}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = parser.add_argument
    option("--jobs", nargs="+", metavar="JOB", help="only these (default: all that can run)")
    option("--minutes", type=float, default=11, help="for everything (default 11)")
    option("--target", type=Path, metavar="DIR", help="folder of the target: config, safetensors, tokenizer")
    option("--draft", type=Path, metavar="DIR", help="its draft (default: the one in hub_cards/)")
    option("--ids", type=Path, metavar="DIR", help="folder of .npy rows of token ids; question.jsonl, if there")
    option("--out", type=Path, default=ROOT / "gpu-results", metavar="DIR", help="default: gpu-results/")
    option("--rehearse", action="store_true", help="the same jobs at tiny size on the CPU")
    return parser.parse_args(arguments)


def choose(options: argparse.Namespace) -> list[str]:
    """
    The jobs to run, after everything that can be checked has been.

    Raises:
        ValueError: an unknown job, a missing option, no GPU, too little memory, no weights, no ids.
    """
    unknown = [name for name in options.jobs or () if name not in JOBS]
    if unknown:
        raise ValueError(f"jobs={unknown} are unknown: expected some of {list(JOBS)}.")
    if options.minutes <= 0:
        raise ValueError(f"minutes={options.minutes:g} leaves no time: expected more than 0.")
    if options.target is not None and not list(options.target.glob("*.safetensors")):
        raise ValueError(
            f"target={str(options.target)!r} holds no *.safetensors: expected a folder that save_pretrained wrote; "
            "join parts first with `python benchmarks/parts.py join`."
        )
    if options.ids is not None and not list(options.ids.glob("*.npy")):
        raise ValueError(f"ids={str(options.ids)!r} holds no *.npy: expected a folder of rows of token ids.")
    if options.rehearse:
        return [name for name in JOBS if name in (options.jobs or JOBS)]

    def lacks(name: str) -> list[str]:
        return [f"--{need}" for need in JOBS[name].needs if getattr(options, need) is None]

    if missing := {name: lacks(name) for name in options.jobs or () if lacks(name)}:
        name, needed = next(iter(missing.items()))
        raise ValueError(f"The job {name!r} needs {' and '.join(needed)}: pass it, or leave the job out of --jobs.")
    import torch

    if not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: run this on a GPU, or pass --rehearse to try the jobs on a CPU.")
    free = torch.cuda.mem_get_info()[0] / 2**30
    chosen = [name for name in JOBS if (name in options.jobs if options.jobs else not lacks(name))]
    if greedy := [name for name in chosen if JOBS[name].gib > free]:
        fit = [name for name in chosen if name not in greedy]
        raise ValueError(
            f"The jobs {greedy} need {max(JOBS[name].gib for name in greedy):g} GiB of GPU memory, "
            f"{free:.1f} are free: free some, or pass --jobs {' '.join(fit) or '(none would fit)'}."
        )
    return chosen


def prepare_rehearsal(options: argparse.Namespace) -> None:
    """A tiny target, its draft and rows of ids in place of those not given."""
    subprocess.run(
        [sys.executable, str(SCRIPT), "--prepare", str(options.out / "rehearsal")],
        check=True, env=environment(rehearse=True),
    )  # fmt: skip
    made = options.out / "rehearsal"
    if options.target is None:
        options.target, options.draft, options.ids = made / "target", made / "draft", made / "ids"


def run_job(name: str, options: argparse.Namespace, left: float) -> dict:
    """Runs one job in a process of its own. Whatever becomes of it, a result comes back."""
    job, began = JOBS[name], time.monotonic()
    result = {"job": name, "about": job.about, "status": "skipped", "reason": None, "figures": {}}
    missing = [module for module in job.modules if importlib.util.find_spec(module) is None]
    limit = min(REHEARSAL_SECONDS if options.rehearse else job.seconds, left)
    if options.rehearse and job.on_cpu:
        return result | {"reason": f"not rehearsed, because {job.on_cpu}"}
    if missing:
        return result | {"reason": f"{', '.join(missing)} is not installed"}
    if limit < 5:
        return result | {"reason": f"--minutes {options.minutes:g} are used up"}
    figures, log = options.out / f".{name}.figures", options.out / f".{name}.log"
    figures.unlink(missing_ok=True)
    told = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    command = [sys.executable, "-u", str(SCRIPT), name, json.dumps(told | {"seconds": limit}), str(figures)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True,
            env=environment(options.rehearse),
        )  # fmt: skip
        try:
            code = process.wait(limit)
            result["status"] = "ok" if code == 0 else "failed"
            result["reason"] = None if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            result |= {"status": "timeout", "reason": f"stopped after {limit:.0f} s"}
        finally:
            with contextlib.suppress(ProcessLookupError):  # with whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    with contextlib.suppress(OSError, ValueError):  # what it had measured when it ended, however it ended
        result |= json.loads(figures.read_text())
    if result["status"] == "failed" and lines:
        result["reason"] += f": {lines[-1]}"
    for file in (figures, log):
        file.unlink(missing_ok=True)
    result |= {"command": shlex.join(command), "rehearsed": options.rehearse}
    return result | {"seconds": round(time.monotonic() - began, 1), "output": lines[-TAIL:]}


def environment(rehearse: bool) -> dict[str, str]:
    """
    The checkout on the path, whether or not it is installed. On a CPU one thread, for tiny models want no more, and
    Triton's interpreter.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    on_cpu = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"} if rehearse else {}
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false", **on_cpu}


def line_of(result: dict) -> str:
    """A row of the table: the job, how it ended, and its headline or the reason."""
    said = result["figures"].get("headline") or result["reason"] or ""
    if result["status"] in ("failed", "timeout"):
        said = f"{result['reason']}{'; until then: ' + said if result['figures'] else ''}"
    return f"{result['job']:15} {result['status']:8} {result.get('seconds', 0):6.1f} s  {said}"


def write_json(path: Path, value) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, default=str) + "\n")
    partial.replace(path)


if __name__ == "__main__":
    print(f"Python {platform.python_version()}, {platform.platform()}", flush=True)
    sys.exit(main())
