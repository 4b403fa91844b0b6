"""Can this model verify trees, or chains? Asked of the model itself, once, never of a list of names."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ..host import CACHE
from .remembered import Remembered
from .stateful import cache_of_rounds, is_stateful
from .target import LOGIT_TRANSFORMS, Target, accepts_positions, attention_windows, execution_device, is_compiled
from .tree import CandidateTree
from .twin import can_have_twin

TOLERANCE = 0.2  # of what a causal mask in the tree's place would change
FULL_TOLERANCE = 2e-4  # the same in full precision, of recurrent layers: some continue a little off their single steps


@dataclass(frozen=True)
class ProbeResult:
    """
    `reason` is `None` if the model can verify trees, or with `chains_only` chains; else it completes "... because". It
    `lasts` unless it says more about the moment than about the model.
    """

    reason: str | None
    use_hook: bool = True
    logit_transform: str = "identity"
    use_twin: bool = False
    lasts: bool = True
    chains_only: bool = False

    def view(self, model: PreTrainedModel) -> Target:
        """The model, seen as the probe has found it."""
        return Target(model, self.use_hook, self.logit_transform, self.use_twin, self.chains_only)


_known = Remembered()


@torch.no_grad()
def probe(model: PreTrainedModel) -> ProbeResult:
    """
    Runs a fixed tree with siblings (0 -> {1, 2}, 2 -> 3) through the model, in its own dtype and attention, and
    compares with the same paths as texts; if that is no use, one of the paths as a chain. Draws nothing.

    The answer is remembered per attention implementation, dtype, device, compilation, autocast, hooks, and by what
    the model's inputs are prepared.
    """
    key = (
        model.config.get_text_config()._attn_implementation,
        model.dtype,
        model.device,
        is_compiled(model),
        torch.is_autocast_enabled(execution_device(model).type),
        foreign_hooks(model),
        _own_preparation(model),
    )
    return _known.get(model, key, lambda: _probe(model), keep=lambda found: found.lasts)


def _own_preparation(model: PreTrainedModel) -> tuple | None:
    """What prepares this very model's inputs, if not its class: PEFT puts itself there, whatever its adapter is."""
    function = vars(model).get("prepare_inputs_for_generation")
    owner = getattr(function, "__self__", None)
    adapter = getattr(owner, "active_peft_config", None)
    return function and (getattr(function, "__func__", function), id(owner), getattr(adapter, "peft_type", None))


class _Drew(Exception):
    """A forward was about to draw a random number."""


class _NoDraws(TorchDispatchMode):
    """Stops this thread's forwards before they draw; other threads and the generator's state have no part in it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # attention is tagged for its dropout, which is 0 in eval mode
        if torch.Tag.nondeterministic_seeded in func.tags and "scaled_dot_product" not in func.name():
            raise _Drew
        return func(*args, **(kwargs or {}))


def _probe(model: PreTrainedModel) -> ProbeResult:
    """A tree, by a twin if that works, or else by the model itself; or else a chain."""
    try:
        stateful = is_stateful(DynamicCache(config=model.config.get_text_config()))
    except Exception as error:
        return ProbeResult(f"no DynamicCache can be made for it ({type(error).__name__}: {error})")
    twins, why = can_have_twin(model) and not is_compiled(model) and not foreign_hooks(model), None
    for use_twin, chains_only in ((True, False), (False, False), (True, True), (False, True)):
        if (use_twin and not twins) or (stateful and not chains_only):
            continue
        try:
            found = _tried(model, use_twin, chains_only, stateful)
        except torch.OutOfMemoryError:
            return ProbeResult("there is no memory for a trial tree", lasts=False)
        except _Drew:
            return ProbeResult("its forward draws random numbers")
        except Exception as error:
            message = str(error).strip() or "no message"
            trial = "chain" if chains_only else "tree"
            found = ProbeResult(f"{type(error).__name__} on a trial {trial}: {message.splitlines()[0]}")
        if found.reason is None:
            return found
        why = found if why is None or not chains_only else why
    return why


def _tried(model: PreTrainedModel, use_twin: bool, chains_only: bool, by_steps: bool = False) -> ProbeResult:
    """
    Args:
        by_steps: compare with the paths read token by token. Else, which takes three forwards, with paths of which all
            but the last token is read at once, and token by token only if they differ.
    """
    text_config = model.config.get_text_config()
    if not chains_only and not accepts_positions(model):
        return ProbeResult("it takes no position_ids")
    if not chains_only:
        try:
            attention_windows(text_config)
        except ValueError as error:
            return ProbeResult(str(error))

    ids = (torch.arange(1, 13, device=execution_device(model)) * 7919 % text_config.vocab_size).expand(2, -1)
    prompt, nodes = ids[:, :8], ids[:, 8:]  # nodes: root, two siblings, a child of the second
    paths = nodes.new_tensor([[0, 1, 2], [0, 2, 3]])  # the first of them as a causal mask would have it

    use_hook = not is_compiled(model)
    watched = _NoDraws if use_hook else nullcontext  # a compiler cannot be watched
    target = Target(model, use_hook, use_twin=use_twin, chains_only=chains_only)
    text = prompt if by_steps else torch.cat((prompt, nodes.gather(1, paths[:, :2])), dim=1)
    host = _HostSteps(model, text, use_hook)
    with watched(), target.listening(), target._armed() as caught:
        outputs = host.step(text)
    if use_hook and not caught:
        return ProbeResult("its decoder's output is out of reach of a forward hook")
    if not isinstance(outputs.get(CACHE), DynamicCache):
        return ProbeResult("its forward returns no DynamicCache")
    if outputs.logits.shape[-1] != text_config.vocab_size:
        return ProbeResult(f"its logits are {outputs.logits.shape[-1]} wide, its vocabulary {text_config.vocab_size}")
    features = target._features(outputs, caught)
    transform = _logit_transform(target, features[:, -1:], outputs.logits[:, -1:])
    if transform is None:
        return ProbeResult("its logits are not its LM head applied to its decoder's output")

    tree = CandidateTree(nodes, nodes.new_tensor([[0, 0, 0, 2]] * 2), nodes.new_tensor([[0, 1, 1, 2]] * 2))
    if chains_only:
        tree = CandidateTree.chain(nodes.gather(1, paths))
    cache, trials, logits = outputs[CACHE], [tree], []
    if is_stateful(cache):  # of one sequence: a chain to go back from, and the rest of the other path
        cache = _HostSteps(model, prompt[:1], use_hook).step(prompt[:1])[CACHE]
        trials = [tree.of(0), CandidateTree.chain(tree.tokens[1:, 1:])]
    arena = cache_of_rounds(cache, prompt.shape[1])
    arena.lengths = [prompt.shape[1]] * len(arena.lengths)
    for trial in trials:
        root = arena.behind(ids.device)
        arena.place(root, arena.longest + len(trial))
        with watched(), target.listening():
            logits.append(target.verify(trial, arena, torch.ones_like(ids[: len(root)], dtype=torch.bool), root)[0])
        arena.keep([[0]] * len(root))
    steps = [] if by_steps else [*outputs.logits[:, -2:].float().unbind(1)]
    for at in range(len(steps), 3):
        with watched() if at != 1 else nullcontext():  # watching takes time
            steps.append(host.logits(nodes.gather(1, paths[:, [at]])))
    (start, _), (first, second), (causal, child) = steps
    if len(trials) > 1:
        truth = torch.stack((start, first, causal, second, child))
    elif chains_only:
        truth = torch.stack((start, first, causal, start, second, child))
    else:
        logits, truth = [logits[0][:1]], torch.stack((start, first, second, child))
    found = torch.cat([part.float().flatten(0, 1) for part in logits])
    error, scale = (found - truth).abs().max(), (causal - second).abs().max()
    full = is_stateful(outputs[CACHE]) and outputs.logits.dtype in (torch.float32, torch.float64)
    full = full and (ids.device.type == "cpu" or torch.get_float32_matmul_precision() == "highest")
    if not error <= (FULL_TOLERANCE if full else TOLERANCE) * scale:
        if not by_steps:
            return _tried(model, use_twin, chains_only, True)
        what = "chain" if chains_only else "tree"
        return ProbeResult(f"a trial {what} came out wrong (error {error:.2g}, a causal mask's {scale:.2g})")
    return ProbeResult(None, use_hook, transform, use_twin, chains_only=chains_only)


class _HostSteps:
    """Forwards as the host's own loop makes them: the prompt, then token by token."""

    def __init__(self, model: PreTrainedModel, prompt: torch.LongTensor, use_hook: bool):
        self.model, self.ids, self.hidden = model, prompt[:, :0], not use_hook
        self.kwargs = {
            CACHE: DynamicCache(config=model.config.get_text_config()),
            "position_ids": torch.arange(prompt.shape[1], device=prompt.device).expand(len(prompt), -1),
            "use_cache": True,
        }

    def step(self, tokens: torch.LongTensor):
        """The outputs of a forward over `tokens` (`[batch, new]`)."""
        first, self.ids = not self.ids.shape[1], torch.cat((self.ids, tokens), dim=1)
        inputs = self.model.prepare_inputs_for_generation(
            self.ids, next_sequence_length=None if first else 1, is_first_iteration=first, **self.kwargs
        )
        outputs = self.model(**inputs, return_dict=True, output_hidden_states=first and self.hidden)
        self.kwargs = self.model._update_model_kwargs_for_generation(outputs, self.kwargs)
        return outputs

    def logits(self, tokens: torch.LongTensor) -> torch.Tensor:
        """`[batch, vocabulary]`, after `tokens` (`[batch, 1]`)."""
        return self.step(tokens).logits[:, -1].float()


def foreign_hooks(model: PreTrainedModel) -> int:
    """
    How many forward hooks there are that may change what the model computes, or look at its modules: neither ours nor
    those that transformers leaves behind once it has been asked for hidden states.
    """
    hooks = [*torch_module._global_forward_hooks.values(), *torch_module._global_forward_pre_hooks.values()]
    hooks += [hook for m in model.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return sum(not _is_harmless(hook) for hook in hooks)


def _is_harmless(hook) -> bool:
    return isinstance(getattr(hook, "__self__", None), Target) or str(getattr(hook, "__module__", "")).startswith(
        "transformers."
    )


def _logit_transform(target: Target, features: torch.Tensor, logits: torch.Tensor) -> str | None:
    for name, transform in LOGIT_TRANSFORMS.items():
        if name != "identity" and not getattr(target.text_config, name, None):
            continue
        made = transform(target.text_config, target.head(features)).float()
        if torch.allclose(made.to(logits.device), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            return name
    return None
