"""What a round of speculation costs, measured once for a pair of models on a device, and stored."""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise

import torch
import transformers
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.cache_utils import DynamicCache

from ..host import CACHE
from ..modeling_fspad import FSPADDraftModel
from ..runtime import cache_folder, write_json
from .candidate_generator import FSPADCandidateGenerator
from .capturing import why_no_graphs
from .graphs import make_rounds
from .target import Target
from .tree import PLAIN, CandidateTree, TreeShape
from .verification import TokenEmitter

PROMPT = 256  # tokens behind which everything is timed
REPEATS = 5  # of each measurement, the quickest counts


@dataclass(frozen=True)
class RoundCosts:
    """
    Seconds. Between the sizes that were measured costs are interpolated.

    Args:
        verify: (rows, seconds) of a forward of the target, ascending; the first is a single row.
        level: (top_k, seconds) of each further level of a draft tree, ascending.
        first: (top_k, seconds) of all the rest: reading the accepted tokens, the first level, pruning.
    """

    verify: tuple[tuple[int, float], ...]
    level: tuple[tuple[int, float], ...]
    first: tuple[tuple[int, float], ...]

    def round(self, shape: TreeShape) -> float:
        """Of a round with such a tree; with a `depth` of 0, of a forward."""
        verified = _between(self.verify, shape.rows)
        if not shape.depth:
            return verified
        return verified + _between(self.first, shape.top_k) + (shape.depth - 1) * _between(self.level, shape.top_k)


def round_costs(target: Target, draft: FSPADDraftModel) -> RoundCosts:
    """
    The costs of a pair: those measured before on such a device, or measured now, which takes some twenty rounds.

    They are kept on the target, and in a file of the cache folder, so that other processes choose the same trees; if
    that cannot be written they are measured again in each process.
    """
    key = _key(target, draft)
    known = target.model.__dict__.setdefault("_fspad_costs", {})
    if key not in known:
        file = cache_folder() / "costs" / f"{key}.json"
        try:
            known[key] = _read(file)
        except (OSError, ValueError, KeyError, TypeError):
            known[key] = measure(target, draft)
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, asdict(known[key]))
    return known[key]


@torch.no_grad()
def measure(target: Target, draft: FSPADDraftModel) -> RoundCosts:
    """
    Times verification forwards and the growing of trees, by the functions that decoding runs.

    Args:
        target: listening, see [`Target.listening`].
    """
    largest = TreeShape.of(draft.config)
    vocabulary, device = target.text_config.vocab_size, target.device
    room = getattr(target.text_config, "max_position_embeddings", None) or PROMPT + largest.depth + 1
    ids = torch.arange(max(min(PROMPT, room - largest.depth - 1), 2), device=device)[None] % vocabulary
    with target._armed() as caught:
        cache = DynamicCache(config=target.text_config)
        outputs = target.model(
            input_ids=ids, use_cache=True, return_dict=True, output_hidden_states=not target.use_hook, **{CACHE: cache}
        )
        features = target._features(outputs, caught)
    generator = FSPADCandidateGenerator(draft, target)
    emitter = TokenEmitter(ids, LogitsProcessorList(), StoppingCriteriaList(), GenerationConfig())
    emitter.take(0)
    rounds = make_rounds(target, generator, emitter, cache, features, torch.ones_like(ids, dtype=torch.bool), 0)
    generator.accept(features[:, :-1], ids[:, 1:])
    pair, length = (features[:, -2:-1], ids[:, -1:].cpu()), generator.cache.length

    def verify(rows: int) -> Callable[[], object]:
        tokens = torch.arange(rows, device=device)[None] % vocabulary
        tree = CandidateTree(tokens, torch.zeros_like(tokens), tokens.clamp(max=1))
        shape = TreeShape(1, rows - 1, rows - 1) if rows > 1 else PLAIN

        def run():
            rounds.begin(shape)
            rounds.grow(PLAIN)  # the last token alone; it tells graphs where they are
            rounds.verify(tree)

        return run

    def draw(depth: int, top_k: int) -> Callable[[], object]:
        shape = TreeShape(depth, top_k, min(largest.total_nodes, top_k + (depth - 1) * top_k**2))

        def run():
            generator.cache.length, rounds.unread = length - 1, [pair]
            rounds.begin(shape)
            rounds.accept()
            rounds.grow(shape)

        return run

    rows = sorted({1, 2, *_halvings(largest.rows)})
    widths = sorted({*_halvings(largest.top_k)})
    forwards = _quickest(device, {n: verify(n) for n in rows})
    short, long = (_quickest(device, {k: draw(depth, k) for k in widths}) for depth in (1, 3))
    rounds.close()
    level = {k: max(long[k] - short[k], 0.0) / 2 for k in widths}
    return RoundCosts(*(tuple(sorted(part.items())) for part in (forwards, level, short)))


def _quickest(device: torch.device, tasks: dict) -> dict[int, float]:
    """The least seconds of each task, taken in turns."""
    taken: dict[int, list[float]] = {name: [] for name in tasks}
    for repeat in range(REPEATS + 1):
        for name, task in tasks.items():
            _synchronize(device)
            began = time.perf_counter()
            task()
            _synchronize(device)
            if repeat:  # the first warms up
                taken[name].append(time.perf_counter() - began)
    return {name: min(seconds) for name, seconds in taken.items()}


def _synchronize(device: torch.device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _halvings(size: int) -> list[int]:
    sizes = [size]
    while sizes[-1] > 2:
        sizes.append((sizes[-1] + 1) // 2)
    return sizes


def _between(points: tuple[tuple[int, float], ...], at: int) -> float:
    """Linear between the points, constant beyond them."""
    if at <= points[0][0]:
        return points[0][1]
    for (low, before), (high, after) in pairwise(points):
        if at <= high:
            return before + (after - before) * (at - low) / (high - low)
    return points[-1][1]


def _key(target: Target, draft: FSPADDraftModel) -> str:
    """Whatever may change a cost."""
    model, device = target.model, target.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    told = {
        "target": _fields(model.config),
        "draft": _fields(draft.config),
        "place": [str(device), name, str(model.dtype), str(draft.dtype), torch.get_num_threads()],
        "attention": target.text_config._attn_implementation,
        "captured": draft.config.cuda_graphs and why_no_graphs(target, draft, model.dtype) is None,
        "versions": [torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _fields(config) -> dict:
    return {k: v for k, v in config.to_dict().items() if k not in ("_name_or_path", "weights_sha256", "dtype")}


def _read(file) -> RoundCosts:
    told = json.loads(file.read_text())
    costs = RoundCosts(*(tuple((int(n), float(s)) for n, s in told[part]) for part in ("verify", "level", "first")))
    if not all(part and all(seconds >= 0 for _, seconds in part) for part in vars(costs).values()):
        raise ValueError(f"{file} is not a measurement.")
    return costs
