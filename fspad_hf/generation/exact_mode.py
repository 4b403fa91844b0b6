"""A mode in which a model's forwards over the rows of a tree have the bits of forwards over one row.

    with fspad_hf.bit_exact(model):
        plain = model.generate(**inputs, do_sample=True)
        ours = model.generate(**inputs, do_sample=True, assistant_model=draft)  # same seed, same tokens, bf16 too

Both calls stand inside: plain decoding then computes as speculation does. Outside, its kernels are the library's own.
"""

import importlib.util
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from ..host import CACHE
from ..prepacking import PackedLinear
from .invariant import MOST, Paths, Rule, Rules, path_attention, paths_of
from .probe import probe
from .stateful import cache_of_rounds
from .tree import CandidateTree

ACTIVATIONS = {kind[0] if isinstance(kind, tuple) else kind for kind in ACT2CLS.values()}
OFFLOADED = "_old_forward"  # what accelerate calls between loading and dropping a module's weights
REGISTERS = 64  # numbers, of any CPU and dtype
REDUCED = 16  # rows that a GPU reduces at a time; for fewer it spreads a row otherwise
MASKS = {"sdpa": sdpa_mask, "eager": eager_mask}
TRIED_PROMPT, TRIED_PATH, TRIED_NODES = 40, 5, (8, 31, 100)
COMPARED = 1_000_000  # outputs of linear layers in trees of each size: in half precision few show another order

_rules = Rules()
_lock = threading.RLock()
_modes: "weakref.WeakKeyDictionary[PreTrainedModel, _Mode]" = weakref.WeakKeyDictionary()


@contextmanager
def bit_exact(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """
    Inside, `generate` gives the same tokens, scores and logits with a draft as without one, bit for bit, in any dtype.

    It may be nested, and entered by several threads: it ends with the last of them. No other model is touched, no
    random number is drawn, and `save_pretrained` writes the model as outside; copy and pickle a model outside.

    Raises:
        ValueError: this model cannot be held bit-exact; the message says why, and the model is as it was.
    """
    with _lock:
        mode = _modes.get(model)
        if mode is None:
            mode = _Mode(model)
            _modes[model] = mode
        mode.users += 1
    try:
        yield model
    finally:
        with _lock:
            mode.users -= 1
            if not mode.users:
                _modes.pop(model, None)
                mode.end()


class _Mode:
    """What was changed of a model, and how it was before."""

    def __init__(self, model: PreTrainedModel):
        self.users, self._forwards, self._attention = 0, [], []
        _refuse(model)
        kernels = uses_kernels(_device_of(model))
        try:
            for name, module in _parts(model):
                if isinstance(module, (nn.Linear, Conv1D)) and _is_linear(module):
                    rule = _kernels_rule() if kernels else _rule_of(name, module)
                    self._put(module, partial(_linear, module, rule, _forward_of(module)))
                elif type(module) in ACTIVATIONS:
                    self._put(module, partial(_activation, _forward_of(module)))
                elif isinstance(getattr(module, "inv_freq", None), torch.Tensor):
                    self._put(module, partial(_rotary, _forward_of(module)))
                elif kernels and _is_norm(module):
                    self._put(module, partial(_norm, _forward_of(module)))
            for config, implementation in _configs(model):
                self._attention.append((config, implementation))
                config._attn_implementation_internal = _name(implementation)
            if (why := differing(model)) is not None:
                raise ValueError(f"{type(model).__name__} cannot be held bit-exact here, because {why}.")
        except BaseException:
            self.end()
            raise

    def _put(self, module: nn.Module, forward: Callable) -> None:
        """In place of what the module computes; accelerate keeps that elsewhere."""
        place = OFFLOADED if OFFLOADED in vars(module) else "forward"
        self._forwards.append((module, place, vars(module).get(place)))
        vars(module)[place] = forward

    def end(self) -> None:
        for module, place, before in reversed(self._forwards):
            if before is None:
                vars(module).pop(place, None)
            else:
                vars(module)[place] = before
        for config, implementation in self._attention:
            config._attn_implementation_internal = implementation


@torch.no_grad()
def _is_linear(module: nn.Module) -> bool:
    """Whether it does what its name says, with a weight that can be read (or will be, when it is loaded)."""
    weight = module.weight
    if type(module) in (nn.Linear, PackedLinear, Conv1D):
        return type(weight) in (nn.Parameter, torch.Tensor) and weight.dtype.is_floating_point
    if weight.device.type == "meta" or not weight.dtype.is_floating_point:
        return False
    x = torch.linspace(-1, 1, 2 * module.in_features, device=weight.device)  # draws nothing
    x = x.view(2, -1).to(weight.dtype)
    return torch.allclose(module(x), nn.functional.linear(x, weight, module.bias), rtol=1e-2, atol=1e-2)


def uses_kernels(device: torch.device) -> bool:
    """Whether products and attention are [`triton_kernels`] there, whose rows never depend on each other."""
    return device.type == "cuda"


def _kernels_rule() -> Rule:
    from .triton_kernels import product

    return Rule(product)


def _rule_of(name: str, module: nn.Module) -> Rule:
    weight = module.weight.T if type(module) is Conv1D else module.weight
    rule = _rules.of(weight, module.bias is not None)
    if rule is None:
        raise ValueError(
            f"No product of this machine gives a row of {name!r} ({tuple(weight.shape)}, {weight.dtype}) the same "
            "bits for all numbers of rows: use float32, or another number of threads."
        )
    return rule


def _forward_of(module: nn.Module) -> Callable:
    return vars(module).get(OFFLOADED, module.forward)


def _linear(module: nn.Module, rule: Rule, forward: Callable, x: torch.Tensor) -> torch.Tensor:
    if x.dim() > 2 and x.shape[-2] > MOST:
        return forward(x)  # a prompt
    weight = module.weight.T if type(module) is Conv1D else module.weight
    return rule(x, weight, module.bias)


def _activation(forward: Callable, x: torch.Tensor) -> torch.Tensor:
    """Each row at the beginning of a vector register: a tail that fills none is computed by other code."""
    lacking = -x.shape[-1] % REGISTERS
    return forward(nn.functional.pad(x, (0, lacking)))[..., : x.shape[-1]] if lacking else forward(x)


def _rotary(forward: Callable, x: torch.Tensor, position_ids: torch.LongTensor, *args, **kwargs):
    """The same for cosines and sines, by a number of rows that fills all registers."""
    rows = position_ids.shape[-1]
    padded = nn.functional.pad(position_ids, (0, -rows % REGISTERS))
    return tuple(part[..., :rows, :] for part in forward(x, padded, *args, **kwargs))


def _is_norm(module: nn.Module) -> bool:
    """Whether it has a weight for each number of a row, and nothing else that it could learn."""
    weights = dict(module.named_parameters())
    return weights.keys() - {"bias"} == {"weight"} and weights["weight"].dim() == 1


def _norm(forward: Callable, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Rows to a multiple of those that a GPU reduces at a time."""
    if args or kwargs:
        return forward(x, *args, **kwargs)
    rows = x.flatten(0, -2)
    return forward(nn.functional.pad(rows, (0, 0, 0, -len(rows) % REDUCED)))[: len(rows)].view_as(x)


def is_exact_forward(forward: Callable) -> bool:
    """Whether it is what the mode puts in a module's place."""
    return isinstance(forward, partial) and forward.func in (_linear, _activation, _rotary, _norm)


def check_rows(model: PreTrainedModel, rows: int) -> None:
    """`ValueError` if the model is held bit-exact, and a round's forward may have more `rows` than it holds for."""
    if model in _modes and rows > MOST:
        raise ValueError(
            f"Trees of up to {rows} rows, looked-up tokens included: bit_exact holds for {MOST}. Set "
            f"draft.speculation_config.tree_total_nodes to less."
        )


def _device_of(model: PreTrainedModel) -> torch.device:
    """Where the model runs; weights on no device are loaded there when they are needed."""
    devices = (weight.device for weight in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _refuse(model: PreTrainedModel) -> None:
    """`ValueError` for what is known not to hold before anything is changed."""
    devices = {weight.device.type for weight in model.parameters()} - {"meta"}
    if len(devices) > 1 or devices - {"cpu", "cuda"}:
        raise ValueError(f"bit_exact holds on a CPU or a CUDA device, and this model is on {sorted(devices)}.")
    if uses_kernels(_device_of(model)) and importlib.util.find_spec("triton") is None:
        raise ValueError("bit_exact needs Triton on a GPU: pip install 'fspad_hf[gpu]'.")
    for config, implementation in _configs(model):
        if implementation not in MASKS:
            raise ValueError(
                f"attn_implementation={implementation!r} of {type(config).__name__}: bit_exact replaces 'sdpa' or "
                "'eager'; load the model with one of them."
            )


def _parts(model: PreTrainedModel) -> list[tuple[str, nn.Module]]:
    """What rounds run: the decoder's modules and the LM head. What sees images runs within a prompt alone."""
    return [*model.get_decoder().named_modules(), ("LM head", model.get_output_embeddings())]


def _configs(model: PreTrainedModel) -> list[tuple]:
    """The configurations that say how its parts attend, and what they say."""
    found = {}
    for _, module in _parts(model):
        config = getattr(module, "config", None)
        if config is not None and isinstance(getattr(config, "_attn_implementation", None), str):
            found[id(config)] = (config, config._attn_implementation)
    return list(found.values())


def _name(implementation: str) -> str:
    return f"fspad_bit_exact_{implementation}"


def exact_attention(
    previous: str,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    Attention whose rows do not depend on each other, see [`path_attention`]; prompts attend as they did before.

    Args:
        query (`[batch, heads, rows, width]`), key, value (`[batch, key heads, columns, width]`).
        attention_mask (`[batch or 1, 1, rows, columns]`): bool or additive; `None` is causal.

    Returns:
        `[batch, rows, heads, width]`.
    """
    (batch, _, rows, width), columns = query.shape, key.shape[2]
    other = dropout or kwargs.get("position_bias") is not None or getattr(module, "is_causal", True) is False
    if rows > MOST or 1 < rows == columns or other:
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        options |= {name: x for name, x in (("softcap", softcap), ("s_aux", s_aux)) if x is not None}
        default = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        attention = default if previous == "eager" else ALL_ATTENTION_FUNCTIONS[previous]
        return attention(module, query, key, value, attention_mask, **options)
    scaling = width**-0.5 if scaling is None else scaling
    if uses_kernels(query.device):
        from .triton_kernels import path_table, tree_attention

        table = None if attention_mask is None else _of_mask(attention_mask, columns, batch, path_table)
        return tree_attention(query, key, value, table, scaling, softcap, s_aux), None
    if attention_mask is None:
        found = [_causal_paths(rows, columns)] * batch
    else:
        found = _of_mask(attention_mask, columns, batch, lambda visible: list(map(paths_of, visible)))
    made = [path_attention(query[b], key[b], value[b], found[b], scaling, softcap, s_aux) for b in range(batch)]
    return made[0][None] if batch == 1 else torch.stack(made), None


def _of_mask(mask: torch.Tensor, columns: int, batch: int, make: Callable):
    """`make` of what each row sees, `[batch, rows, columns]`: once for all the layers that share a mask."""
    known = vars(mask).setdefault("_fspad_paths", {})
    if columns not in known:
        visible = mask[:, 0, :, :columns]
        visible = visible if visible.dtype == torch.bool else visible > torch.finfo(visible.dtype).min / 2
        known[columns] = make(visible.expand(batch, -1, -1))
    return known[columns]


@lru_cache(maxsize=4)
def _causal_paths(rows: int, columns: int) -> Paths:
    return paths_of(torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows))


for _implementation, _mask in MASKS.items():
    AttentionInterface.register(_name(_implementation), partial(exact_attention, _implementation))
    AttentionMaskInterface.register(_name(_implementation), _mask)


@torch.no_grad()
def differing(model: PreTrainedModel) -> str | None:
    """
    Completes "... because", if the model's rows depend on how many there are: a path of tokens, one by one, against
    the same path within trees of several sizes, all bits compared. `None` if all are equal.
    """
    found = probe(model)
    if found.reason is not None:
        return None  # it is decoded plainly, with a draft as without one
    view, device = found.view(model), _device_of(model)
    vocabulary = view.text_config.vocab_size
    outputs = sum(m.weight.shape[0] for m in model.modules() if isinstance(m, nn.Linear)) or 10_000
    sizes = (TRIED_PATH,) if found.chains_only else TRIED_NODES
    for number in range(max(min(COMPARED // (outputs * TRIED_PATH), 40), 2)):
        ids = torch.arange(1, TRIED_PROMPT + TRIED_PATH + 1, device=device) * (7919 + 104729 * number) % vocabulary
        prompt, path = ids[None, :TRIED_PROMPT], ids[TRIED_PROMPT:]
        cache, steps = _prefilled(model, view, prompt), []
        for token in path.view(-1, 1, 1):
            steps.append(model(input_ids=token, use_cache=True, **{CACHE: cache}).logits[0, -1])
        for count in sizes:
            tree, places = _scattered(path.tolist(), count, vocabulary, device)
            arena = cache_of_rounds(_prefilled(model, view, prompt), TRIED_PROMPT)
            root = arena.behind(device)
            arena.place(root, TRIED_PROMPT + len(tree))
            with view.listening():
                shown = torch.ones(1, TRIED_PROMPT + len(tree), dtype=torch.bool, device=device)
                logits, _ = view.verify(tree, arena, shown, root)
            for place, (node, truth) in enumerate(zip(places, steps, strict=True)):
                if not torch.equal(logits[0, node], truth):
                    differ = int((logits[0, node] != truth).sum())
                    return (
                        f"the logits of a path's token {place + 1} among {len(tree)} rows differ from those of one "
                        f"row in {differ} of {vocabulary}"
                    )
    return None


def _prefilled(model: PreTrainedModel, view, prompt: torch.LongTensor) -> DynamicCache:
    cache = DynamicCache(config=view.text_config)
    model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    return cache


def _scattered(path: list[int], count: int, vocabulary: int, device) -> tuple[CandidateTree, list[int]]:
    """A tree of `count` nodes that holds `path` among others, and where."""
    if count == len(path):
        return CandidateTree.chain(torch.tensor([path], device=device)), list(range(count))
    tokens, parents, depths, places = [path[0]], [0], [0], [0]
    others = count - len(path)
    for depth, token in enumerate(path[1:], start=1):
        for number in range(others * (depth - 1) // (len(path) - 1), others * depth // (len(path) - 1)):
            tokens.append((token + 1 + number) % vocabulary)
            parents.append(places[-1]), depths.append(depth)
        tokens.append(token), parents.append(places[-1]), depths.append(depth)
        places.append(len(tokens) - 1)
    return CandidateTree(*(torch.tensor([part], device=device) for part in (tokens, parents, depths))), places


__all__ = ["bit_exact", "differing"]
