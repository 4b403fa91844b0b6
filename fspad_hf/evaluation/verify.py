"""`fspad-hf verify`: is FSPAD lossless on this model, this machine, these settings? Nothing else is measured."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..generation import exact_mode
from ..generation.probe import probe
from ..loading import encode_chat, load_models
from ..modeling_fspad import FSPADDraftModel
from ..runtime import quiet_transformers, writable_file, write_json
from .divergence import BIT_OUTPUTS, first_different_bits, first_divergence

GREEDY = {"num_beams": 1, "do_sample": False}
SAMPLED = {"num_beams": 1, "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
PROMPTS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
    "List ten animals, one a line. Then list them again in reverse.",
)


@dataclass(frozen=True)
class Setting:
    """One row of the battery: arguments of `generate`, and whether it is about a long prompt."""

    name: str
    arguments: dict[str, Any]
    long_prompt: bool = False


@dataclass
class Check:
    """
    The outcome of one setting over all prompts and seeds.

    Args:
        compared: answers held against plain generate's; same: those with equal tokens (and, sampled, an equal state of
            the random generator afterwards).
        real: differences that rounding does not explain; near_ties: those that it may, in half precision.
        speculated: answers that ran in rounds rather than fall back; tokens, rounds: of these.
    """

    name: str
    compared: int = 0
    same: int = 0
    near_ties: int = 0
    real: int = 0
    speculated: int = 0
    tokens: int = 0
    rounds: int = 0
    differences: list[dict] = field(default_factory=list)
    error: str | None = None

    @property
    def passed(self) -> bool:
        return self.error is None and self.real == 0 and self.compared > 0


def battery(model: PreTrainedModel, tokenizer, max_new_tokens: int) -> list[Setting]:
    """Settings in which speculative decoders have been seen to differ from plain generate."""
    eos = model.generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos] if eos is not None else []
    frequent = tokenizer.encode(" the", add_special_tokens=False)[-1]
    return [
        Setting("greedy", GREEDY),
        Setting("greedy, repetition_penalty 1.3", {**GREEDY, "repetition_penalty": 1.3}),
        Setting("greedy, no_repeat_ngram_size 2", {**GREEDY, "no_repeat_ngram_size": 2}),
        Setting("greedy, min_new_tokens", {**GREEDY, "min_new_tokens": max_new_tokens // 2}),
        Setting("greedy, several EOS", {**GREEDY, "eos_token_id": [*eos, frequent]}),
        Setting("greedy, stop_strings", {**GREEDY, "stop_strings": [".", ";"], "tokenizer": tokenizer}),
        Setting("greedy, long prompt", GREEDY, long_prompt=True),
        Setting("T = 1", SAMPLED),
        Setting("T = 0.3", {**SAMPLED, "temperature": 0.3}),
        Setting("T = 1.5", {**SAMPLED, "temperature": 1.5}),
        Setting("top_p 0.9", {**SAMPLED, "top_p": 0.9}),
        Setting("top_k 50, T = 0.7", {**SAMPLED, "temperature": 0.7, "top_k": 50}),
        Setting("min_p 0.05", {**SAMPLED, "min_p": 0.05}),
        Setting("typical_p 0.9", {**SAMPLED, "typical_p": 0.9}),
        Setting("repetition_penalty 1.3", {**SAMPLED, "repetition_penalty": 1.3}),
        Setting("no_repeat_ngram_size 3", {**SAMPLED, "no_repeat_ngram_size": 3}),
        Setting("several EOS", {**SAMPLED, "eos_token_id": [*eos, frequent]}),
        Setting("stop_strings", {**SAMPLED, "stop_strings": [".", ";"], "tokenizer": tokenizer}),
        Setting("long prompt", SAMPLED, long_prompt=True),
    ]


def verify(
    model: PreTrainedModel,
    tokenizer,
    draft: FSPADDraftModel,
    prompts: Sequence[str] = PROMPTS,
    seeds: Sequence[int] = (0, 1),
    max_new_tokens: int = 48,
    long_prompt: int | None = None,
    report: Callable[[Check], None] = lambda check: None,
    bits: bool = False,
) -> list[Check]:
    """
    Holds FSPAD against plain `generate`, setting by setting.

    Args:
        seeds: of the sampled settings.
        long_prompt: tokens of the long prompt; by default past the model's sliding window, if it has one, else a
            quarter of its context, and at most 2,048.
        report: called with each setting's [`Check`] as it is done.
        bits: inside [`bit_exact`]: hidden states and logits are compared bit for bit, too, and no tie is an excuse.

    Raises:
        ValueError: no prompt, no seed, or max_new_tokens below 2.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts) or not seeds or max_new_tokens < 2:
        raise ValueError(
            f"prompts={list(prompts)!r}, seeds={list(seeds)!r}, max_new_tokens={max_new_tokens}: expected texts, a "
            "seed or more, and at least 2 tokens."
        )
    exact = bits or (model.dtype in (torch.float32, torch.float64) and getattr(model, "hf_quantizer", None) is None)
    texts = [encode_chat(tokenizer, [{"role": "user", "content": prompt}], model.device) for prompt in prompts]
    lengthened = [lengthen(texts[0], long_prompt or _long_length(model, max_new_tokens))]
    checks = []
    for setting in battery(model, tokenizer, max_new_tokens):
        check = Check(setting.name)
        try:
            for inputs in lengthened if setting.long_prompt else texts:
                for seed in seeds if setting.arguments["do_sample"] else seeds[:1]:
                    _hold_against_plain(
                        model, draft, inputs, setting.arguments, seed, max_new_tokens, exact, check, bits
                    )
        except Exception as error:
            check.error = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        checks.append(check)
        report(check)
    return checks


def _hold_against_plain(
    model, draft, inputs, arguments, seed, max_new_tokens, exact, check: Check, bits: bool
) -> None:
    wanted = {**arguments, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    wanted |= BIT_OUTPUTS if bits else {}
    torch.manual_seed(seed)
    plain = model.generate(**inputs, **wanted)
    state = _random_state(model.device)
    torch.manual_seed(seed)
    fast = model.generate(**inputs, **wanted, assistant_model=draft)
    same_state = torch.equal(state, _random_state(model.device))
    record = fast.speculation if hasattr(fast, "speculation") else None
    if record is not None:
        check.speculated += 1
        check.tokens, check.rounds = check.tokens + sum(record.accepted_lengths), check.rounds + record.rounds
    check.compared += 1
    found = first_divergence(model, inputs, plain.sequences, fast.sequences, seed=seed, **arguments)
    differing = first_different_bits(plain, fast) if bits else None
    if found is None and same_state and differing is None:
        check.same += 1
        return
    if differing is not None:
        check.differences.append({"seed": seed, "bits": asdict(differing)})
    if found is None:
        check.real += 1
        if not same_state:
            check.differences.append({"seed": seed, "random_state": "differs"})
        return
    if not exact and found.is_near_tie("sampled" if arguments["do_sample"] else "greedy"):
        check.near_ties += 1
    else:
        check.real += 1
    check.differences.append({"seed": seed, **asdict(found)})


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _long_length(model: PreTrainedModel, max_new_tokens: int) -> int:
    text = model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2048
    window = getattr(text, "sliding_window", None)
    wanted = window + 64 if isinstance(window, int) and window + 64 + max_new_tokens < context else context // 4
    return max(min(wanted, 2048 if not isinstance(window, int) else wanted, context - max_new_tokens), 8)


def lengthen(inputs: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """The prompt, its middle repeated to about `length` tokens; its ends, where a template has its marks, stay."""
    ids = inputs["input_ids"]
    third = max(ids.shape[1] // 3, 1)
    middle = ids[:, third:-third] if ids.shape[1] > 2 * third else ids
    copies = max((length - ids.shape[1]) // middle.shape[1], 0)
    ids = torch.cat((ids[:, :third], *[middle] * copies, ids[:, third:]), dim=-1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def run_verify(
    target: str | None = None, draft: str | None = None, device: str | None = None, dtype: str | None = None,
    prompts: Sequence[str] | None = None, seeds: int = 2, max_new_tokens: int = 48, long_prompt: int | None = None,
    json_file: str | None = None, bit_exact: bool = False,
    **trees: int | str | None,
) -> bool:  # fmt: skip
    """`fspad-hf verify`: prints a row a setting; whether some answer was speculated, and no difference is
    left that rounding does not explain."""
    from rich.console import Console
    from rich.text import Text

    json_file = writable_file(json_file) if json_file is not None else None
    if seeds < 1 or max_new_tokens < 2:
        raise ValueError(f"seeds={seeds}, max_new_tokens={max_new_tokens}: expected 1 or more, and 2 or more.")
    models = load_models(target, draft, device, dtype, **trees)
    console = Console()

    def show(check: Check):
        console.print(Text(_line(check), "" if check.passed else "bold red"), soft_wrap=True)

    with quiet_transformers(), exact_mode.bit_exact(models.target) if bit_exact else nullcontext():
        checks = verify(
            models.target, models.tokenizer, models.draft, prompts or PROMPTS, range(seeds), max_new_tokens,
            long_prompt, show, bit_exact,
        )  # fmt: skip
    if json_file is not None:
        write_json(json_file, [asdict(check) | {"passed": check.passed} for check in checks])
    passed = all(check.passed for check in checks)
    if passed and not any(check.speculated for check in checks):
        reason = probe(models.target).reason
        why = f", because {reason}" if reason else ""
        console.print(Text(f"NOTHING VERIFIED: every answer ran without speculation{why}", "bold red"))
        return False
    compared, same = sum(check.compared for check in checks), sum(check.same for check in checks)
    near = sum(check.near_ties for check in checks)
    what = str(models.target.dtype).removeprefix("torch.") + ", bit for bit" * bit_exact
    console.print(
        f"{'lossless' if passed else 'NOT LOSSLESS'} in {what}: {same} of {compared} answers identical"
        + (f", {near} part at a near tie" if near else ""),
        style="bold green" if passed else "bold red", highlight=False,
    )  # fmt: skip
    return passed


def _line(check: Check) -> str:
    if check.error is not None:
        return f"{check.name:32} {check.error}"
    tau = f"tau {check.tokens / check.rounds:.2f}" if check.rounds else ""
    fallen = check.compared - check.speculated
    notes = [
        tau,
        f"{fallen} without speculation" if fallen else "",
        f"{check.near_ties} near ties" * bool(check.near_ties),
    ]
    notes += [f"DIFFERS: {difference}" for difference in check.differences if not check.passed]
    return f"{check.name:32} {check.same}/{check.compared} identical  " + "  ".join(note for note in notes if note)
