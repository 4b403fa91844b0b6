"""Can this model verify trees? Asked of the model itself, once, never of a list of names."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from .cache import ArenaCache
from .target import LOGIT_TRANSFORMS, Target, accepts_positions, attention_windows, execution_device, is_compiled
from .tree import CandidateTree

TOLERANCE = 0.2  # of what a causal mask in the tree's place would change


@dataclass(frozen=True)
class ProbeResult:
    """`reason` is `None` if the model can verify trees; else it completes "... because"."""

    reason: str | None
    use_hook: bool = True
    logit_transform: str = "identity"


@torch.no_grad()
def probe(model: PreTrainedModel) -> ProbeResult:
    """
    Runs a fixed tree with siblings (0 -> {1, 2}, 2 -> 3) through the model, in its own dtype and attention, and
    compares with the same paths run one by one.

    The answer is kept on the model, per attention implementation, dtype, device and compilation.
    """
    key = (
        model.config.get_text_config()._attn_implementation,
        model.dtype,
        model.device,
        is_compiled(model),
    )
    known = model.__dict__.setdefault("_fspad_probe", {})
    if key not in known:
        try:
            known[key] = _probe(model)
        except torch.OutOfMemoryError:
            raise  # says nothing about the model
        except Exception as error:
            message = str(error).strip() or "no message"
            known[key] = ProbeResult(f"{type(error).__name__} on a trial tree: {message.splitlines()[0]}")
    return known[key]


def _probe(model: PreTrainedModel) -> ProbeResult:
    text_config = model.config.get_text_config()
    if not accepts_positions(model):
        return ProbeResult("it takes no position_ids")
    try:
        attention_windows(text_config)
    except ValueError as error:
        return ProbeResult(str(error))

    device = execution_device(model)
    ids = (torch.arange(1, 13, device=device) * 7919 % text_config.vocab_size)[None]
    prompt, nodes = ids[:, :8], ids[:, 8:]  # nodes: root, two siblings, a child of the second

    def run(slots: list[int]) -> torch.Tensor:
        sequence = torch.cat((prompt, nodes[:, slots]), dim=1)
        return model(input_ids=sequence, use_cache=False, return_dict=True).logits[0, -len(slots) :].float()

    use_hook = not is_compiled(model)
    target = Target(model, use_hook)
    with target.listening(), target._armed() as caught:
        outputs = model(
            input_ids=prompt, past_key_values=DynamicCache(config=text_config), use_cache=True, return_dict=True,
            output_hidden_states=not use_hook,
        )  # fmt: skip
    if use_hook and not caught:
        return ProbeResult("its decoder's output is out of reach of a forward hook")
    features = target._features(outputs, caught)
    transform = _logit_transform(target, features[:, -1:], outputs.logits[:, -1:])
    if transform is None:
        return ProbeResult("its logits are not its LM head applied to its decoder's output")

    parents = torch.tensor([[0, 0, 0, 2]], device=device)
    depths = torch.tensor([[0, 1, 1, 2]], device=device)
    prefix = torch.ones_like(prompt, dtype=torch.bool)
    arena = ArenaCache.from_dynamic(outputs.past_key_values)
    with target.listening():
        logits, _ = target.verify(CandidateTree(nodes, parents, depths), arena, prefix, prompt.shape[1])
    tree, first, second, control = logits[0].float(), run([0, 1]), run([0, 2, 3]), run([0, 1, 2, 3])
    truth = torch.stack((first[0], first[1], second[1], second[2]))
    error, scale = (tree - truth).abs().max(), (control - truth).abs().max()
    if not error <= TOLERANCE * scale:
        return ProbeResult(f"a trial tree came out wrong (error {error:.2g}, a causal mask's {scale:.2g})")
    return ProbeResult(None, use_hook, transform)


def _logit_transform(target: Target, features: torch.Tensor, logits: torch.Tensor) -> str | None:
    for name, transform in LOGIT_TRANSFORMS.items():
        if name != "identity" and not getattr(target.text_config, name, None):
            continue
        made = transform(target.text_config, target.head(features)).float()
        if torch.allclose(made.to(logits.device), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            return name
    return None
