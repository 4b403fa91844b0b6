"""
The documentation holds: every block of README.md and docs/*.md runs as it stands. The models that it names are tiny
ones here, in folders of those names or on a hub on the loopback interface.
"""

import ast
import dataclasses
import importlib
import inspect
import io
import json
import os
import random
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import gpu
import numpy as np
import parts
import peft
import pytest
import serving
import torch
import yaml
from accelerate.commands.launch import launch_command_parser
from packaging.requirements import Requirement

import fspad_hf
import fspad_hf_cli as cli
from fspad_hf import demo_target
from fspad_hf.generation import hook

from . import tiny, tiny_vision
from .conftest import fresh_draft
from .conversion import reference
from .training.test_processes import free_port

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parents[1]
DOCUMENTS = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
TARGET, DRAFT = "SmolLM2-135M-Instruct", "SmolLM2-135M-Instruct-FSPAD"
HUB_TARGET, PUSHED = f"HuggingFaceTB/{TARGET}", "user/my-draft"
SLOW = ("benchmarks", "training")
CPU_ONLY = "ACCELERATE_USE_CPU=true"
TYPED = "Why is the sky blue?\n/reset\nAnd at night?\n/exit\n"
SMALL = {  # what stands in the documents, or the default, would take minutes
    "demo": {"--max-new-tokens": "5"},
    "chat": {"--max-new-tokens": "5"},
    "explain": {"--max-new-tokens": "8"},
    "bench": {"--max-new-tokens": "5", "--per-task": "1", "--turns": "1", "--methods": "prompt-lookup fspad"},
    "verify": {"--max-new-tokens": "4", "--seeds": "1", "--prompt": "Why?"},
    "profile": {"--max-new-tokens": "12", "--methods": "prompt-lookup", "--repeats": "1"},
    "acceptance": {"--max-new-tokens": "5", "--per-task": "1"},
    "train": {"--max-steps": "2", "--batch-rows": "4", "--micro-rows": "4"},
    "ablate": {"--max-steps": "1", "--batch-rows": "2", "--per-task": "1", "--max-new-tokens": "3", "--seeds": "0"},
    "selfplay": {"--rows": "48", "--row-length": "48", "--batch-rows": "48"},
}
FENCE = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n\n?)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.S | re.M)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block, and what the comment before it says: `file: NAME`, for what the reader has to write."""

    document: str
    line: int
    language: str
    text: str
    mark: str

    def __str__(self) -> str:
        return f"{self.document}, line {self.line}"


def blocks(document: str) -> list[Block]:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert text.count("\n```") % 2 == 0, f"{document} has a block that is not closed"
    found = [
        Block(document, text[: match.start("text")].count("\n"), match["language"], match["text"], match["mark"] or "")
        for match in FENCE.finditer(text)
    ]
    assert len(found) == text.count("\n```") / 2
    return found


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a bash block: lines joined and split as a shell would, `&&` between two."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            found.append(words[:end])
            words = words[end + 1 :]
    return found


@pytest.fixture(scope="module")
def stock(tmp_path_factory, tokenizer):
    """A folder of all that the documents name: models, token rows and questions."""
    folder = tmp_path_factory.mktemp("stock")
    model = tiny.build("llama")
    model.save_pretrained(folder / "cache" / TARGET)
    tokenizer.save_pretrained(folder / "cache" / TARGET)
    draft = fresh_draft(model, tree_depth=3, tree_top_k=3, tree_total_nodes=8)
    draft.config.target_name_or_path = HUB_TARGET
    draft.save_pretrained(folder / "hub_cards" / DRAFT, tokenizer=tokenizer)
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    peft.get_peft_model(tiny.build("llama"), adapter).save_pretrained(folder / "adapter")
    eagle = reference.weights_of("vicuna", model.get_input_embeddings().weight)
    reference.write(folder / "eagle", "vicuna", eagle)
    choose = random.Random(0)
    texts = [f"<u>why {choose.random()}|<a>because {choose.random()}|".ljust(64, "|")[:64] for _ in range(540)]
    rows = np.array([tokenizer.encode(text, add_special_tokens=False)[:40] for text in texts], dtype=np.uint16)
    (folder / "files").mkdir()
    np.save(folder / "files" / "rows.npy", rows)
    categories = ("writing", "translation", "summarization", "qa", "math_reasoning", "rag")
    lines = [json.dumps({"category": category, "turns": ["Why?", "And then?"]}) for category in categories]
    for place in (folder / "files" / "question.jsonl", folder / "cache" / "spec_bench_question.jsonl"):
        place.write_text("\n".join(lines))
    return folder


class Runner:
    """Runs the blocks of one document, one after the other, in one folder and one namespace."""

    def __init__(self, stock: Path, folder: Path, monkeypatch, environment: dict[str, str]):
        self.stock, self.folder, self.monkeypatch, self.environment = stock, folder, monkeypatch, environment
        # What the README's first block takes as given.
        ids = torch.tensor([[1, 17, 5, 40, 9]])
        self.namespace = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
        self._enter(folder)

    def run(self, block: Block) -> None:
        if block.mark.startswith("file: "):
            (self.folder / block.mark.removeprefix("file: ")).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), self.namespace)
        elif block.language == "bash":
            for words in commands(block):
                self._command(words, block)
        elif block.language == "json":
            assert [json.loads(line) for line in block.text.splitlines()]

    def _command(self, words: list[str], block: Block) -> None:
        known = {"fspad-hf": self._fspad, "pip": check_pip, "pytest": check_pytest, "mkdir": self._mkdir,
                 "cd": lambda arguments: self._enter(self.folder / arguments[0]),
                 "vllm": check_vllm, "tests/serving/environment": lambda arguments: None,
                 "python": self._python, ".": lambda arguments: None, "accelerate": check_launch}  # fmt: skip
        if words[0] == CPU_ONLY:
            return self._launch(words[2:])
        assert words[0] in known, f"{block}: no test knows how to run {shlex.join(words)}"
        known[words[0]](words[1:])

    def _fspad(self, arguments: list[str]) -> None:
        if arguments[0] == "chat":
            self.monkeypatch.setattr(sys, "stdin", io.StringIO(TYPED))
        assert cli.main(self._shortened(arguments)) == 0, f"fspad-hf {shlex.join(arguments)}"

    def _python(self, arguments: list[str]) -> None:
        """The scripts of the checkout; what they do is tested in test_gpu_script.py."""
        if arguments[0] == "benchmarks/gpu.py":
            assert set(gpu.parse(arguments[1:]).jobs or ()) <= gpu.JOBS.keys()
        elif arguments[0] == "benchmarks/parts.py":
            (self.folder / "model.safetensors").write_bytes(b"weights")
            assert parts.main(arguments[1:]) == 0
        elif arguments[0] == "examples/as_pasted.py":
            options = with_option(with_option(arguments[1:], "--per-task", ["1"]), "--max-new-tokens", ["4"])
            runpy.run_path(str(ROOT / arguments[0]))["main"](options)
        elif arguments[0] == "examples/near_tie.py":
            near_tie = runpy.run_path(str(ROOT / arguments[0]))
            near_tie["draw"]({"float32": [8.1, 8.2], "bfloat16": [8.125, 8.125]}, ["a", "b"], "near-tie.svg")
        elif arguments[0] == "benchmarks/serving.py":
            assert serving.make_parser().parse_args(arguments[1:]).draft
        elif arguments[0] == "examples/first_call.py":
            runpy.run_path(str(ROOT / arguments[0]))["main"]([*arguments[1:], "--max-new-tokens", "4"])
        else:
            check_venv(arguments)

    def _shortened(self, arguments: list[str]) -> list[str]:
        options = vars(cli.make_parser().parse_args(arguments))
        for option, value in SMALL.get(arguments[0], {}).items():
            arguments = with_option(arguments, option, value.split())
        if arguments[0] == "bench" and "--prompts" in arguments:
            arguments = with_option(arguments, "--per-task", [])
        if "device" in options:
            arguments = with_option(arguments, "--device", ["cpu"])
        if "row_length" in options:
            arguments = with_option(arguments, "--row-length", ["48"])
        if "--context" in arguments:
            arguments = with_option(arguments, "--context", ["100"])
        return arguments

    def _launch(self, arguments: list[str]) -> None:
        """`accelerate launch`, in processes of its own; in another folder, as the next block may train there too."""
        start = arguments.index("fspad_hf") + 1
        check_launch(arguments)
        command = with_option(self._shortened(arguments[start:]), "--output", ["draft-of-two"])
        port = ["--main_process_port", str(free_port())]  # the default one may be taken
        launcher = [sys.executable, "-m", "accelerate.commands.launch", *port, *arguments[1:start]]
        done = subprocess.run([*launcher, *command], env=self.environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-4000:]

    def _mkdir(self, arguments: list[str]) -> None:
        (self.folder / arguments[-1]).mkdir(parents="-p" in arguments)

    def _enter(self, folder: Path) -> None:
        """Also puts there what a reader would have brought."""
        self.folder = folder
        self.monkeypatch.chdir(folder)
        for path in (self.stock / "files").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        models = {"": f"cache/{TARGET}", "-of-the-fine-tune": f"cache/{TARGET}", "-of-its-draft": f"hub_cards/{DRAFT}"}
        (folder / "path" / "or").mkdir(parents=True)
        for suffix, place in (models | {"-of-the-checkpoint": "eagle", "-of-an-adapter": "adapter"}).items():
            (folder / "path" / "or" / f"hub-id{suffix}").symlink_to(self.stock / place)


def with_option(arguments: list[str], option: str, values: list[str]) -> list[str]:
    """The arguments with other values of an option; without values it is left out."""
    if option in arguments:
        start = arguments.index(option)
        end = start + 1
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        arguments = arguments[:start] + arguments[end:]
    return arguments + ([option, *values] if values else [])


def check_pip(arguments: list[str]) -> None:
    assert arguments[0] == "install"
    known = {Requirement(text).name: Requirement(text) for text in PROJECT["dependencies"]}
    for argument in arguments[1:]:
        if argument in (".", "vllm"):
            continue
        if extras := re.fullmatch(r"\.\[([\w,]+)\]", argument):
            assert set(extras[1].split(",")) <= PROJECT["optional-dependencies"].keys()
        elif not argument.startswith("-"):
            wanted = Requirement(argument)
            versions = [specifier.version for specifier in wanted.specifier]
            assert all(known[wanted.name].specifier.contains(version) for version in versions)


def check_vllm(arguments: list[str]) -> None:
    """What it does is tested in tests/serving, where it is installed."""
    command, target, option, settings = arguments
    assert (command, option) == ("serve", "--speculative-config") and Path(target).exists()
    assert json.loads(settings)["method"] == "eagle" and Path(json.loads(settings)["model"]).exists()


def check_pytest(arguments: list[str]) -> None:
    for argument in arguments:
        assert argument.startswith("-") or (ROOT / argument).exists()


def check_launch(arguments: list[str]) -> None:
    """All that can be done about a launch on GPUs; the one on CPUs is also run."""
    launched = launch_command_parser().parse_args(arguments[1:])
    assert (arguments[0], launched.module, launched.training_script) == ("launch", True, "fspad_hf")
    assert launched.num_processes > 1 and cli.make_parser().parse_args(launched.training_script_args)


def check_venv(arguments: list[str]) -> None:
    assert arguments[:2] == ["-m", "venv"]


@pytest.mark.parametrize(
    "document", [pytest.param(d, marks=[pytest.mark.slow] if Path(d).stem in SLOW else []) for d in DOCUMENTS]
)
def test_every_block_runs(document, stock, tmp_path, monkeypatch, local_hub):
    monkeypatch.setenv("FSPAD_HF_CACHE", str(stock / "cache"))
    monkeypatch.setattr(demo_target, "files", lambda package: stock / package)
    monkeypatch.setattr(demo_target, "_download", lambda folder: pytest.fail("downloads"))
    fallbacks = []
    monkeypatch.setattr(hook.logger, "warning_once", fallbacks.append)
    local_hub.users["hf_user"] = "user"
    monkeypatch.setenv("HF_TOKEN", "hf_user")
    local_hub.create(HUB_TARGET, {path.name: path.read_bytes() for path in (stock / "cache" / TARGET).iterdir()})
    (tmp_path / "work").mkdir()
    environment = os.environ | {
        CPU_ONLY.split("=")[0]: "true", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT),
        "HF_ENDPOINT": local_hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "*",
    }  # fmt: skip
    runner = Runner(stock, tmp_path / "work", monkeypatch, environment)
    for block in blocks(document):
        runner.run(block)
    assert not fallbacks
    if any("fspad-hf push" in block.text for block in blocks(document)):
        assert {"README.md", "config.json", "model.safetensors"} <= local_hub.repos[PUSHED].files().keys()


def test_every_block_is_of_a_kind_that_is_run():
    for document in DOCUMENTS:
        for block in blocks(document):
            assert not block.mark or block.mark.startswith("file: "), f"{block}: {block.mark!r}"
            assert block.language in ("python", "bash", "json", "text"), f"{block}: {block.language!r}"
            assert block.language != "text" or not re.search(r"^(fspad-hf|import|from) ", block.text, re.M), str(block)


def test_every_command_is_shown():
    bash = [block for document in DOCUMENTS for block in blocks(document) if block.language == "bash"]
    shown = {words[1] for block in bash for words in commands(block) if words[0] == "fspad-hf"}
    assert shown == set(cli.COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            found = (ROOT / document).parent / path if path else ROOT / document
            assert found.exists(), link
            if anchor:
                headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.M)
                assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
    assert max(map(len, text.splitlines())) <= 200


def test_api_names_every_public_name_and_nothing_else():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    table = text.split("## fspad_hf\n")[1].split("###")[0]
    assert re.findall(r"^\| `(\w+)`", table, re.M) and set(re.findall(r"^\| `(\w+)`", table, re.M)) == set(
        fspad_hf.__all__
    )
    for config in (fspad_hf.FSPADConfig, fspad_hf.SpeculationConfig):
        fields = text.split(f"### {config.__name__}\n")[1].split("###")[0]
        named = {name for row in re.findall(r"^\| (`[^|]+) \|", fields, re.M) for name in re.findall(r"`(\w+)`", row)}
        assert named and named <= config.__annotations__.keys(), named
    assert named == fspad_hf.SpeculationConfig.__annotations__.keys()


def test_api_signatures_are_those_of_the_code():
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    found = re.findall(r"`(fspad_hf\.[\w.]+)\.(\w+)\(([\w,\s]*)\)`", text)
    assert len(found) > 15
    for module, name, listed in found:
        parameters = re.findall(r"\w+", listed)
        function = getattr(importlib.import_module(module), name)
        known = inspect.signature(function).parameters
        assert [p for p in parameters if p not in known] == [], f"{module}.{name}"
        required = {p.name for p in known.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
        assert required <= set(parameters), f"{module}.{name}"


def test_support_lists_the_models_that_see():
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    (seeing,) = re.findall(r"\| with images \|(.*)\|", text)
    assert re.findall(r"\w+", seeing) == list(tiny_vision.CONFIGS)


def test_support_lists_every_rule_of_the_hook():
    """Each reason in `why_not` stands in the table, as far as it is the same for every call."""
    text = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    tree = ast.parse(inspect.getsource(hook.why_not))
    (rules,) = [node for node in ast.walk(tree) if isinstance(node, ast.Dict) and node.keys]
    reasons = []
    for key in rules.keys:
        parts = [
            p.value for p in (key.values if isinstance(key, ast.JoinedStr) else [key]) if isinstance(p, ast.Constant)
        ]
        reasons.append(max(parts, key=len).split("(")[0].split(",")[-1].strip())
    assert len(reasons) > 10
    assert [reason for reason in reasons if reason not in text] == []


def test_the_map_shows_every_module():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The map")[1].split("##")[0]
    rows = re.findall(r"^\| (`[^|]+) \|", text, re.M)
    shown = set()
    for row in rows:  # of several names the first has the folder
        first, *others = re.findall(r"`([^`]+)`", row)
        folder = first.rpartition("/")[0]
        shown |= {first, *(name if "/" in name else f"{folder}/{name}".lstrip("/") for name in others)}
    package = ROOT / "fspad_hf"
    modules = {path.relative_to(package).as_posix() for path in package.rglob("*.py") if path.name[0] != "_"}
    assert len(modules) > 60 and modules == {name for name in shown if name.endswith(".py")}
    assert all((ROOT / name).exists() for name in shown - modules) and "fspad_hf_cli/" in shown


def test_versions_are_those_of_the_project():
    wanted = {Requirement(text).name: text for text in PROJECT["dependencies"]}
    for document in ("README.md", "docs/support.md", "docs/quickstart.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        assert wanted["torch"] in text and wanted["transformers"] in text
        assert f"Python {PROJECT['requires-python'].removeprefix('>=')}" in text
    assert os.path.getsize(ROOT / "docs" / "images" / "tree.svg") > 1000


def test_pictures_have_a_title_an_alt_text_and_plain_spaces():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("hub_cards/**/*.md")]
    embedded = {
        (page.parent / place).resolve(): alt
        for page in pages
        for alt, place in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    }
    drawn = {*ROOT.glob("docs/**/*.svg"), *ROOT.glob("hub_cards/**/*.svg")}
    assert drawn and embedded.keys() == drawn and all(" " in alt for alt in embedded.values())
    for path in drawn:
        title, text = ElementTree.parse(path).getroot()[0], path.read_text(encoding="utf-8")
        assert title.tag.endswith("}title") and " " in title.text and "\N{OPEN BOX}" not in title.text
        assert "\N{NO-BREAK SPACE}" not in text


def test_the_citation_is_that_of_the_cards():
    made = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    (paper,) = made["references"]
    assert (made["title"], made["license"]) == (PROJECT["name"], PROJECT["license"])
    card = (ROOT / "hub_cards" / "card.md.jinja").read_text(encoding="utf-8")
    bibtex = dict(re.findall(r"^  (\w+) += \{(.*)\}", card, re.M))
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    found = {"title": paper["title"], "author": authors, "journal": paper["journal"], "year": str(paper["year"])}
    assert found == bibtex and paper["url"] == PROJECT["urls"]["Paper"]


def test_ci_runs_the_readme_command_on_every_python_of_the_project():
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]["tests"]
    pythons = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if ":: Python :: 3." in text]
    assert job["strategy"]["matrix"]["python"] == pythons and PROJECT["requires-python"] == f">={pythons[0]}"
    command = re.search(r"-c \"\$\((.*)\)\"$", job["steps"][-1]["run"])[1]
    found = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert found in (ROOT / "README.md").read_text(encoding="utf-8") and "[test]" in found and "&& pytest" in found
