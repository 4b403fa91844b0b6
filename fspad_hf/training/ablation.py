"""The evidence: what each part of FSPAD is worth in tau, by drafts of the same data, steps and seeds.

DIR/fspad-seed0/, ...            a folder a draft, as `train` leaves it
DIR/measured/answers-greedy.json what the target says, once a temperature, for all drafts
DIR/measured/fspad-seed0.json    the rounds of a draft over those answers
DIR/results.json, report.md      the figures, and their plots
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from rich.console import Console
from transformers import AutoTokenizer

from ..configuration_fspad import FSPADConfig
from ..evaluation.ablation_report import BASELINE, OURS, judge, write_report
from ..evaluation.bench import describe_machine
from ..evaluation.paired import paired_difference
from ..evaluation.spec_bench import read_questions
from ..modeling_fspad import FSPADDraftModel
from ..runtime import (
    changed_settings,
    check_reachable,
    counted,
    duration,
    quiet_transformers,
    status,
    write_file,
    write_json,
)
from ..speculation_config import SpeculationConfig
from .acceptance import KnownAnswer, known_answers, mean_tau, simulate_answer
from .arguments import FSPADTrainingArguments, started
from .data import DataConfig
from .plan import make_plan
from .provenance import CURVE, read_provenance
from .run import load_target, public_name, run_training
from .trainer import last_checkpoint

VARIANTS = {  # name of its folders: what reports call it, its fields
    "fspad": (OURS, {"feature_sampling": True, "partial_alignment": True}),
    "no-feature-sampling": ("without feature sampling", {"feature_sampling": False, "partial_alignment": True}),
    "no-partial-alignment": ("without partial alignment", {"feature_sampling": True, "partial_alignment": False}),
    "eagle2": (BASELINE, {"feature_sampling": False, "partial_alignment": False}),
}
BETWEEN = tuple(VARIANTS)[1:-1]
MEASURED = "measured"
SAME = ("data_sha256", "held_out_sha256", "target_revision")  # beyond settings, what the drafts of a seed must share
SHOWN = ("parameters", "seconds", "weights_of_step", "device", "rows", "row_length", "steps", "batch_rows")
SHOWN += ("learning_rate", "data", "data_sha256", "weights_sha256", "validation_tau", "fspad_hf", "torch")
ANSWERS = {"greedy": None, "sampled": 0}  # seeds: prompt number n is sampled with n, whatever its draft's seed


@dataclass(frozen=True)
class Draft:
    """One of the drafts: to be trained, trained, or measured."""

    variant: str
    args: FSPADTrainingArguments
    fields: dict

    @property
    def folder(self) -> Path:
        return Path(self.args.output_dir)

    @property
    def title(self) -> str:
        return VARIANTS[self.variant][0]

    def provenance(self) -> dict | None:
        """Its training.json, once it is trained."""
        return read_provenance(self.folder) or None


def run_ablation(
    target: str,
    data: DataConfig | Sequence[str],
    args: FSPADTrainingArguments,
    questions: str | None = None,
    seeds: Sequence[int] = (0, 1),
    between: Sequence[str] = BETWEEN,
    per_task: int = 40,
    max_new_tokens: int = 128,
    dtype: torch.dtype = torch.float32,
    draft_overrides: dict | None = None,
    plan: bool = False,
    **training,
) -> dict | None:
    """
    Trains FSPAD, FSPAD without either of its parts and without both (EAGLE-2), a draft a seed each, measures tau on
    the first turns of Spec-Bench, and writes results.json, report.md and plots to `args.output_dir`.

    Called again it goes on where it stood: drafts that are trained, answers and measurements are taken as they are.
    Under `accelerate launch` all processes train each draft together, and the main one measures.

    Args:
        args: of all trainings but for the seed and the folder, which is one of the drafts' folders.
        questions: Spec-Bench's question.jsonl; by default the published one, downloaded once.
        seeds: of the trainings of FSPAD and of EAGLE-2; those in between have the first one.
        between: the drafts with one of the two parts: "no-feature-sampling", "no-partial-alignment", both or neither.
        per_task, max_new_tokens: questions of each task, and tokens of each answer.
        draft_overrides: other fields of [`FSPADConfig`], the same for all drafts.
        plan: print what would be done, and do nothing.
        training: rows, draft_vocab_size, target_name, device_map: as [`run_training`].

    Returns:
        What results.json holds: title, command, measured (what on), machine, drafts, figures and verdict (see
        [`judge`]); `None` for a plan, and on other processes than the main one.

    Raises:
        ValueError, OSError, FloatingPointError: as [`run_training`]; and the folder holds work under other settings.
    """
    import matplotlib  # noqa: F401  whether it is there should be known before the trainings

    state = started(args)
    data = data if isinstance(data, DataConfig) else DataConfig(data)
    with state.main_process_first():  # which downloads them
        asked = [(question.task, question.turns[0]) for question in read_questions(questions, per_task)]
    check_reachable(target, "target")
    fields = {**(draft_overrides or {}), "draft_vocab_size": training.get("draft_vocab_size")}
    fields["draft_vocab_size"] = make_plan(target, fields).draft_vocab_size
    drafts = _drafts(args, seeds, between, fields)
    _check(args, data, max_new_tokens)
    measured = _measurement(target, asked, per_task, max_new_tokens, dtype)
    _check_begun(drafts, [_wanted(draft, target, data, dtype, training) for draft in drafts], measured, state)
    if plan:
        run_training(
            target, data, drafts[0].args, dtype=dtype, draft_overrides=drafts[0].fields, plan=True, **training
        )
        _print_plan(drafts, target, measured, state)
        return None
    _train(drafts, target, data, dtype, training, state)
    if not state.is_main_process:
        return None
    _measure(drafts, target, asked, measured, dtype, training.get("device_map"), state.device)
    return _report(drafts, target, measured, Path(args.output_dir), state.device)


def _drafts(args: FSPADTrainingArguments, seeds, between, overrides: dict) -> list[Draft]:
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)}: expected one or more, each once and 0 or more.")
    if unknown := sorted(set(between) - set(BETWEEN)):
        raise ValueError(f"between={unknown}: expected some of {list(BETWEEN)}, or none.")
    made = []
    for seed in seeds:
        for variant, (_, fields) in VARIANTS.items():
            if variant in BETWEEN and (variant not in between or seed != seeds[0]):
                continue
            own = replace(args, seed=seed, output_dir=str(Path(args.output_dir) / f"{variant}-seed{seed}"))
            made.append(Draft(variant, own, {**overrides, **fields}))
    return made


def _check(args: FSPADTrainingArguments, data: DataConfig, max_new_tokens: int) -> None:
    if Path(args.output_dir).is_file():
        raise ValueError(f"output={args.output_dir!r} is a file: expected a folder, which is made if need be.")
    if max_new_tokens < 2:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to draft: expected 2 or more.")
    if data.regenerate:
        raise ValueError("regenerate would be done for each draft: regenerate once with train, and pass its files.")


def _check_begun(drafts: list[Draft], wanted: list[dict], measured: dict, state) -> None:
    """That what the main process finds in the folder is of this ablation. It tells the others."""
    error = None
    if state.is_main_process:
        try:
            for draft, settings in zip(drafts, wanted, strict=True):
                _check_trained(draft, settings)
                _read_kept(_measured_path(draft), measured)
            for name in ANSWERS:
                _read_kept(_measured_path(drafts[0]).with_name(f"answers-{name}.json"), measured)
            _check_same_data(drafts)
        except ValueError as found:
            error = str(found)
    if error := broadcast_object_list([error])[0]:
        raise ValueError(error)


def _wanted(draft: Draft, target: str, data: DataConfig, dtype: torch.dtype, training: dict) -> dict:
    """What the training.json and config.json of a finished draft must say."""
    wanted = {name: getattr(draft.args, name) for name in CURVE}
    wanted |= {"target": training.get("target_name") or public_name(target), "target_dtype": _name(dtype)}
    wanted |= {"data": [public_name(source) for source in data.data]}
    wanted |= {"linear_start": draft.args.linear_start}
    if training.get("rows") is not None:
        wanted["rows"] = training["rows"]
    wanted |= {f"draft_{name}": value for name, value in draft.fields.items()}
    return json.loads(json.dumps(wanted, default=str))


def _check_trained(draft: Draft, wanted: dict) -> None:
    if (told := draft.provenance()) is None:
        return
    saved = vars(FSPADConfig.from_pretrained(draft.folder)) | vars(SpeculationConfig.from_pretrained(draft.folder))
    told |= {f"draft_{name}": saved[name] for name in draft.fields}
    if changes := changed_settings({name: told.get(name) for name in wanted}, wanted):
        raise ValueError(
            f"The draft in {str(draft.folder)!r} was trained with other settings ({changes}): repeat the first ones "
            "to go on, or name another output."
        )


def _check_same_data(drafts: list[Draft]) -> None:
    """That the drafts of a seed have seen the same rows; names of files do not tell."""
    first: dict[int, tuple[Path, dict]] = {}
    for draft in drafts:
        if (told := draft.provenance()) is not None:
            ours = {name: told.get(name) for name in SAME}
            folder, theirs = first.setdefault(draft.args.seed, (draft.folder, ours))
            if changes := changed_settings(theirs, ours):
                raise ValueError(
                    f"The drafts in {str(folder)!r} and {str(draft.folder)!r} cannot be compared ({changes}): "
                    "expected the same data; delete the one that was trained on other rows."
                )


def _measurement(
    target: str, asked: list[tuple[str, str]], per_task: int, max_new_tokens: int, dtype: torch.dtype
) -> dict:
    """What the answers are a function of, for [`_read_kept`]."""
    return {
        "target": public_name(target), "dtype": _name(dtype), "per_task": per_task, "prompts": len(asked),
        "prompts_sha256": sha256(json.dumps(asked).encode("utf-8")).hexdigest(), "max_new_tokens": max_new_tokens,
    }  # fmt: skip


def _train(drafts: list[Draft], target: str, data: DataConfig, dtype: torch.dtype, training: dict, state) -> None:
    console = Console(quiet=not state.is_main_process)
    # The main process's disk decides for all: another machine may not see it.
    left = set(broadcast_object_list([[d.args.output_dir for d in drafts if d.provenance() is None]])[0])
    for number, draft in enumerate(drafts):
        if draft.args.output_dir not in left:
            continue
        seconds = [told["seconds"] for d in drafts if (told := d.provenance()) is not None]
        after = f", about {duration(np.mean(seconds) * len(left))} of training left" if seconds else ""
        console.print(f"Training {draft.folder.name}, {number + 1} of {len(drafts)}{after}", highlight=False)
        run_training(target, data, draft.args, dtype=dtype, draft_overrides=draft.fields, **training)
        left.discard(draft.args.output_dir)
        if state.is_main_process:
            _check_same_data(drafts)


def _measure(
    drafts: list[Draft], target: str, asked: list[tuple[str, str]], measured: dict, dtype: torch.dtype, device_map,
    device: torch.device,
) -> None:  # fmt: skip
    left = [draft for draft in drafts if _rows(draft, measured) is None]
    if not left:
        return
    with status(f"Loading {target}"):
        model = load_target(target, dtype, device_map, device)
    folder = _measured_path(left[0]).parent
    folder.mkdir(parents=True, exist_ok=True)
    answers = _answers(model, AutoTokenizer.from_pretrained(target), asked, measured, folder)
    with quiet_transformers(), counted("answers simulated", len(left) * len(answers)) as advance:
        for draft in left:
            loaded = FSPADDraftModel.from_pretrained(draft.folder, dtype=model.dtype).to(model.device).eval()
            rows = []
            for answer in answers:
                rows += simulate_answer(model, loaded, answer, measured["max_new_tokens"])
                advance()
            _keep(_measured_path(draft), measured, rows, weights_sha256=loaded.config.weights_sha256)


def _answers(model, tokenizer, asked: list[tuple[str, str]], measured: dict, folder: Path) -> list[KnownAnswer]:
    """Greedy and sampled ones, decoded where an earlier call has not."""
    found = []
    for name, seed in ANSWERS.items():
        path = folder / f"answers-{name}.json"
        if (kept := _read_kept(path, measured)) is None:
            with quiet_transformers(), counted(f"{name} answers", len(asked)) as advance:
                made = []
                for answer in known_answers(model, tokenizer, asked, measured["max_new_tokens"], seed):
                    made.append(answer)
                    advance()
            made.sort(key=lambda answer: answer.prompt)
            _keep(path, measured, [asdict(answer) for answer in made])
        else:
            made = [KnownAnswer(**answer) for answer in kept["kept"]]
        found += made
    return found


def _measured_path(draft: Draft) -> Path:
    return draft.folder.parent / MEASURED / f"{draft.folder.name}.json"


def _rows(draft: Draft, measured: dict) -> list[dict] | None:
    """The rows of [`simulate_answer`] if these very weights were measured."""
    kept = _read_kept(_measured_path(draft), measured)
    return kept["kept"] if kept and kept["weights_sha256"] == draft.provenance()["weights_sha256"] else None


def _keep(path: Path, settings: dict, kept: list[dict], **about) -> None:
    write_file(path, json.dumps({"settings": settings, **about, "kept": kept}) + "\n")


def _read_kept(path: Path, settings: dict) -> dict | None:
    """What [`_keep`] wrote, if anything; `ValueError` if under other settings."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if changes := changed_settings(found["settings"], settings):
        raise ValueError(
            f"{str(path)!r} was measured with other settings ({changes}): repeat the first ones to go on, delete "
            f"{str(path.parent)!r} to measure the drafts anew, or name another output."
        )
    return found


def _report(drafts: list[Draft], target: str, measured: dict, folder: Path, device: torch.device) -> dict:
    figures = figures_of([(d.title, d.args.seed, _rows(d, measured)) for d in drafts])
    results = {
        "title": f"The parts of FSPAD on {Path(target).name}",
        "command": "fspad-hf " + shlex.join(sys.argv[1:]),
        "measured": measured,
        "machine": describe_machine(device),
        "drafts": [
            {"draft": d.title, "seed": d.args.seed, **{name: d.provenance().get(name) for name in SHOWN}}
            for d in drafts
        ],
        "figures": figures,
        "verdict": judge(figures),
    }
    write_json(folder / "results.json", results)
    write_report(folder, results)
    console = Console()
    for line in results["verdict"]["lines"]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(f"The tables are in {folder / 'report.md'}", highlight=False, markup=False, soft_wrap=True)
    return results


def figures_of(measured: Sequence[tuple[str, int, list[dict]]]) -> dict[str, dict[str, dict]]:
    """
    `figures[mode][draft]` as [`judge`] takes them, FSPAD first.

    Args:
        measured: what reports call a draft, the seed of its training, and its rows of [`simulate_answer`]; all of the
            same answers.
    """
    figures: dict[str, dict[str, dict]] = {}
    for mode in dict.fromkeys(row["mode"] for row in measured[0][2]):
        tasks = {row["prompt"]: row["task"] for row in measured[0][2] if row["mode"] == mode}
        sums, taus = {}, {}  # by draft, of each of its seeds
        for name, seed, rows in measured:
            mine = {row["prompt"]: (row["tokens"], row["rounds"]) for row in rows if row["mode"] == mode}
            sums.setdefault(name, {})[seed] = np.array([mine[prompt] for prompt in tasks])
            taus.setdefault(name, {})[seed] = mean_tau(rows, mode)
        figures[mode] = {name: _figures(taus[name]) for name in taus}
        for name in (name for name in sums if name != OURS):
            shared = sums[OURS].keys() & sums[name].keys()  # seeds lie further apart than drafts
            ours, theirs = (sum(sums[draft][seed] for seed in shared) for draft in (OURS, name))
            found = paired_difference(ours, theirs, list(tasks.values()))
            for task, figure in found["tasks"].items():
                figures[mode][name]["tasks"][task]["difference"] = figure
            if found["mean"]:
                figures[mode][name]["mean"]["difference"] = found["mean"]
    return figures


def _figures(taus: dict[int, tuple[dict[str, float], float]]) -> dict:
    """tau of one draft, the mean over its seeds."""

    def tau(values: list[float]) -> dict:
        return {"tau": {"value": round(float(np.mean(values)), 4), "low": None, "high": None}}

    by_task = [of_tasks for of_tasks, _ in taus.values()]
    if not by_task[0]:
        return {"tasks": {}, "mean": None, "seeds": {}}
    return {
        "tasks": {task: tau([values[task] for values in by_task]) for task in by_task[0]},
        "mean": tau([mean for _, mean in taus.values()]),
        "seeds": {str(seed): round(mean, 4) for seed, (_, mean) in taus.items()},
    }


def _print_plan(drafts: list[Draft], target: str, measured: dict, state) -> None:
    console = Console(quiet=not state.is_main_process)
    console.print(f"{measured['prompts']} prompts, {measured['max_new_tokens']} new tokens; the drafts:")
    width = max(len(draft.folder.name) for draft in drafts)
    for draft in drafts:
        parameters = make_plan(target, draft.fields, False).parameters
        at = "trained" if draft.provenance() else "begun" if last_checkpoint(draft.folder) else "to train"
        at += " and measured" if draft.provenance() and _rows(draft, measured) is not None else ""
        line = f"{draft.folder.name:<{width}} {draft.title}, {parameters:,} parameters, seed {draft.args.seed}: {at}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
