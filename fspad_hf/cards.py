"""A draft's model card: from its configuration, its provenance and its results to a README.md with metadata."""

import json
import math
import os
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .configuration_fspad import FSPADConfig
from .weights import weight_files

TEMPLATE = "card.md.jinja"
TAGS = ["fspad", "eagle", "speculative-decoding", "assisted-generation"]
SPEC_BENCH = "spec-bench"  # as `fspad-hf bench` names its source
MEASURES = ("tau", "speedup")
SCALAR = (str, int, float, bool, type(None))


@dataclass(frozen=True)
class Results:
    """
    A draft's results on Spec-Bench, or on the user's own prompts.

    Args:
        tasks: task -> {"tau": ..., "speedup": ...} with one of them or both, in the order of the file.
        settings: what else the file says of the measurement, such as the machine.
        source: the file of the user's own prompts; by default Spec-Bench.
    """

    tasks: dict[str, dict[str, float]]
    settings: dict[str, object] = field(default_factory=dict)
    source: str | None = None

    @property
    def measured(self) -> list[str]:
        """Which of tau and speed-up there is a value of."""
        return [measure for measure in MEASURES if any(measure in values for values in self.tasks.values())]


def read_results(path: str | os.PathLike) -> Results:
    """
    Reads the `summary` of a results file:

        {"summary": {"tasks": {"mt_bench": {"tau": 2.1, "speedup": 1.4}, ...}, "machine": "...", ...}}

    A task may have tau, speed-up or both (`null` is none); other keys of a task are passed over. Scalars of the
    summary besides `tasks` are told in the card. In place of one summary there may be one a method, of which
    `"fspad"` is read: `{"summary": {"fspad": {"tasks": ...}, "plain": ...}}`. Results are Spec-Bench's unless
    `{"config": {"source": ...}}` says otherwise, as `fspad-hf bench --prompts` writes it.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such JSON, or a value is no positive number.
    """
    document = _read_json_object(path)
    summary, config = document.get("summary"), document.get("config")
    outer = summary if isinstance(summary, dict) else {}
    inner = outer["fspad"] if isinstance(outer.get("fspad"), dict) else outer
    tasks = inner.get("tasks")
    if not isinstance(tasks, dict) or not tasks:
        raise ValueError(
            f"results={str(path)!r} has no results: expected "
            '{"summary": {"tasks": {"TASK": {"tau": ..., "speedup": ...}}, "machine": ...}}.'
        )
    found = {}
    for task, values in tasks.items():
        values = values if isinstance(values, dict) else {}
        found[task] = {name: values[name] for name in MEASURES if values.get(name) is not None}
        for name, value in found[task].items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ValueError(
                    f"results={str(path)!r}: {name}={value!r} of task {task!r}: expected a positive number."
                )
        if not found[task]:
            raise ValueError(f"results={str(path)!r}: task {task!r} has neither a tau nor a speedup: leave it out.")
    settings = {**outer, **inner}
    source = config.get("source") if isinstance(config, dict) else None
    return Results(
        found,
        {name: value for name, value in settings.items() if isinstance(value, SCALAR)},
        None if source in (None, SPEC_BENCH) else str(source),
    )


def read_provenance(path: str | os.PathLike) -> dict[str, object]:
    """
    Reads how a draft was trained: a flat JSON object whose values are scalars or lists of scalars.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no such JSON.
    """
    provenance = _read_json_object(path)
    for name, value in provenance.items():
        if not all(isinstance(item, SCALAR) for item in (value if isinstance(value, list) else [value])):
            raise ValueError(
                f"{str(path)!r}: {name}={value!r} does not fit in a table: expected a flat object of strings, "
                "numbers, booleans, nulls and lists of them; flatten it."
            )
    return provenance


def make_card(
    folder: str | os.PathLike,
    repo_id: str,
    config: FSPADConfig,
    target_name: str,
    results: Results | None = None,
    provenance: dict[str, object] | None = None,
    *,
    license: str | None = None,
    datasets: list[str] | None = None,
    tags: list[str] | None = None,
    revision: str | None = None,
) -> ModelCard:
    """
    The card of the draft in `folder`, whose quick start runs as pasted once the draft is at `repo_id`.

    Args:
        folder: what `save_pretrained` wrote.
        repo_id: `user/name`.
        config: the draft's.
        target_name: the target's Hub id, the card's `base_model`.
        results, provenance: see [`read_results`] and [`read_provenance`]; the card leaves out what is `None`.
        license, datasets, tags: for the metadata; `tags` are added to this package's own.
        revision: the branch that the quick start loads, if not the default one.
    """
    name = repo_id.split("/")[-1]
    data = ModelCardData(
        library_name="transformers",
        base_model=target_name,
        base_model_relation="adapter",  # the Hub's word for weights that run only together with their base model
        pipeline_tag="text-generation",
        license=license,
        datasets=datasets,
        tags=list(dict.fromkeys([*TAGS, *(tags or [])])),
        model_name=name if results else None,
        eval_results=_eval_results(results) if results else None,
    )
    weights = weight_files(folder)
    return ModelCard.from_template(
        data,
        template_path=str(card_template()),
        model_title=name,
        repo_id=repo_id,
        target=target_name,
        revision_argument=f", revision={json.dumps(revision)}" if revision else "",
        parameters=f"{count_parameters(weights) / 1e6:.3g}M",
        size=f"{sum(path.stat().st_size for path in weights) / 1e6:.3g} MB",
        has_chat_template=_has_chat_template(Path(folder)),
        training_rows=[(_cell(key), _cell(value)) for key, value in (provenance or {}).items()],
        **_results_table(results),
        **{name: getattr(config, name) for name in ("draft_vocab_size", "vocab_size")},
    )


def card_template() -> Path:
    """The template: inside the installed package, or in a source checkout. `OSError` if it is in neither."""
    package = Path(str(files("fspad_hf")))
    places = (package / TEMPLATE, package.parent / "hub_cards" / TEMPLATE)
    for place in places:
        if place.is_file():
            return place
    raise OSError(
        f"The card template is in neither {str(places[0])!r} nor {str(places[1])!r}: install fspad_hf from its wheel "
        "or from a full checkout, or put a README.md of your own into the draft's folder."
    )


def count_parameters(weights: list[Path]) -> int:
    """How many floating-point numbers the safetensors files hold."""
    total = 0
    for path in weights:
        with safe_open(path, framework="pt") as tensors:
            slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118  it is no mapping
            total += sum(math.prod(part.get_shape()) for part in slices if "F" in part.get_dtype())
    return total


def _eval_results(results: Results) -> list[EvalResult]:
    shown = {"tau": "tau (tokens per target forward)", "speedup": "speed-up over plain generate"}
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Text Generation",
            dataset_type=results.source or "hemingkx/Spec-Bench",
            dataset_name=f"{results.source or 'Spec-Bench'} ({task})",
            dataset_config=task,
            metric_type=measure,
            metric_name=shown[measure],
            metric_value=value,
        )
        for task, values in results.tasks.items()
        for measure, value in values.items()
    ]


def _results_table(results: Results | None) -> dict[str, object]:
    if results is None:
        return {"result_rows": []}
    formats = {"tau": "{:.2f}", "speedup": "{:.2f} x"}
    taus = [values["tau"] for values in results.tasks.values() if "tau" in values]
    return {
        "results_on": _cell(results.source or "Spec-Bench"),
        "result_columns": ["task", *("speed-up" if name == "speedup" else name for name in results.measured)],
        "result_rows": [
            [_cell(task), *(formats[m].format(values[m]) if m in values else "" for m in results.measured)]
            for task, values in results.tasks.items()
        ],
        "mean_tau": f"{sum(taus) / len(taus):.2f}" if taus else None,
        "settings": "; ".join(f"{_cell(key)}: {_cell(value)}" for key, value in results.settings.items()),
    }


def _cell(value) -> str:
    """A value as Markdown that stays within its table cell."""
    parts = ["-" if part is None else str(part) for part in (value if isinstance(value, list) else [value])]
    return " ".join(", ".join(parts).split()).replace("|", "\\|")


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and bool(_read_json_object(settings).get("chat_template"))


def _read_json_object(path: str | os.PathLike) -> dict:
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is no JSON ({error}): expected a file with one JSON object.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{str(path)!r} holds a {type(value).__name__}: expected a file with one JSON object.")
    return value
