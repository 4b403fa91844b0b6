"""`fspad-hf chat`: a conversation in the terminal, streamed, with tau and the speed of each answer."""

import contextlib
import signal
import sys
import threading
import time

import torch
from rich.console import Console
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from .host import CACHE
from .loading import Models, encode_chat, load_models
from .runtime import common_prefix, quiet_transformers
from .streaming import LEGEND, RunStreamer

HELP = """\
/help   lists the commands
/reset  starts a new conversation
/exit   ends, as Ctrl-D and Ctrl-C at the prompt do; Ctrl-C during an answer stops that answer"""


def run_chat(
    target: str | None = None,
    draft: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    max_new_tokens: int = 256,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    greedy: bool = False,
    seed: int | None = None,
    system: str | None = None,
    console: Console | None = None,
    **trees: int | str | None,
) -> None:
    """
    Reads messages from standard input, a line each, until its end, `/exit` or Ctrl-C, and streams the answers.

    Ctrl-C during an answer stops that answer: what was said so far stays in the conversation. A second one, before the
    next token, takes the message back. Where standard input or output is no terminal, the output is plain text without
    banner, prompts or colours, and Ctrl-C ends during answers as well.

    Args:
        target, draft, device, dtype, trees (`tree_depth` ... `tree`): see [`load_models`].
        max_new_tokens: the most tokens of an answer; the target's context can leave fewer.
        temperature, top_p, top_k: any of them turns sampling on; what is left out is as in the target's
            generation_config, as is everything if all are. A temperature of 0 is `greedy`.
        greedy: no sampling.
        seed: given to `torch.manual_seed` once, before the first answer.
        system: the system message.

    Raises:
        ValueError, OSError: an argument is wrong, or a model cannot be had.
    """
    sampling = _checked_sampling(max_new_tokens, temperature, top_p, top_k, greedy)
    interactive = sys.stdin.isatty() and (console or Console()).is_terminal
    console = console or (Console() if interactive else Console(force_terminal=False, no_color=True))
    try:
        models = load_models(target, draft, device, dtype, **trees)
        with quiet_transformers():
            chat = _Chat(models, console, interactive, system, {"max_new_tokens": max_new_tokens, **sampling})
            if seed is not None:
                torch.manual_seed(seed)
            if interactive:
                with contextlib.suppress(ImportError):  # not on every platform
                    import readline  # noqa: F401  # `input` edits lines and remembers them once it is imported
                chat.banner()
            while chat.turn():
                pass
    except KeyboardInterrupt:  # while loading or waiting
        console.out()


def _checked_sampling(max_new_tokens, temperature, top_p, top_k, greedy) -> dict:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens} leaves nothing to generate: expected 1 or more.")
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {name: value for name, value in given.items() if value is not None and (name, value) != ("temperature", 0)}
    greedy = greedy or temperature == 0
    if greedy and given:
        raise ValueError(f"greedy (temperature 0) takes no {', '.join(given)}: leave out one or the other.")
    if temperature is not None and not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be finite and 0 (greedy) or more.")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p} must be above 0 and at most 1 (1: off).")
    if top_k is not None and top_k < 0:
        raise ValueError(f"top_k={top_k} must be 0 (off) or more.")
    return {"do_sample": False} if greedy else {"do_sample": True, **given} if given else {}


class _CtrlC(StoppingCriteria):
    """Inside the block Ctrl-C ends an answer as any criterion does, after a whole token; a second one raises."""

    came, _before = False, None

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # only that one may handle signals
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *error):
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def __call__(self, input_ids: torch.LongTensor, scores, **kwargs) -> torch.BoolTensor:
        return torch.full((len(input_ids),), self.came, device=input_ids.device)

    def _note(self, number: int, frame) -> None:
        if self.came:
            raise KeyboardInterrupt
        self.came = True


class _Chat:
    """The models, the conversation so far, and where it is shown."""

    def __init__(self, models: Models, console: Console, interactive: bool, system: str | None, options: dict):
        self.models, self.console, self.interactive, self.options = models, console, interactive, options
        self.context = getattr(models.target.config.get_text_config(), "max_position_embeddings", None)
        self.opening = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.opening)
        self._read: tuple[list[int], DynamicCache] | None = None  # the last turn's tokens and their cache
        self._check_template()

    def banner(self) -> None:
        """What answers, and how."""
        model, generation = self.models.target, {**self.models.target.generation_config.to_dict(), **self.options}
        names = ("temperature", "top_p", "top_k") if generation.get("do_sample") else ()
        sampling = [f"{name} {generation[name]}" for name in names if generation.get(name) is not None]
        speculation = self.models.draft.speculation_settings(model.device)
        most_tokens, most = self.options["max_new_tokens"], "at most " if speculation.tree == "auto" else ""
        rows = {
            "target": f"{self.models.target_name} ({str(model.dtype).removeprefix('torch.')} on {model.device})",
            "draft": self.models.draft_name,
            "answers": ", ".join(("sampled" if names else "greedy", *sampling, f"up to {most_tokens} tokens")),
            "trees": f"{speculation.tree}, {most}depth {speculation.tree_depth}, top-k {speculation.tree_top_k}, "
            f"{speculation.tree_total_nodes} nodes, {speculation.tree_lookup_tokens} of them looked up",
        }
        for name, value in rows.items():
            self._say(f"{name:8}{value}")
        self.console.print(LEGEND, highlight=False)
        self._say(HELP)

    def turn(self) -> bool:
        """Reads a line and answers it; whether the conversation goes on."""
        try:
            line = input("> " if self.interactive else "").strip()
        except EOFError:
            if self.interactive:
                self.console.out()
            return False
        if line == "/exit":
            return False
        if line == "/reset":
            self.messages = list(self.opening)
            self._say("A new conversation.")
        elif line == "/help":
            self._say(HELP)
        elif line.startswith("/"):
            self._say(f"Unknown command {line.split()[0]}: /help lists them.")
        elif line:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        asked = [*self.messages, {"role": "user", "content": line}]
        inputs = encode_chat(self.models.tokenizer, asked, self.models.target.device)
        length = inputs["input_ids"].shape[1]
        room = self.options["max_new_tokens"] if self.context is None else self.context - length
        if room < 1:
            self._say(
                f"Not sent: with this message the conversation has {length} tokens, and the context of "
                f"{self.models.target_name} holds {self.context} with the answer. /reset starts a new one."
            )
            return
        start, interrupt = time.perf_counter(), _CtrlC()
        try:
            with interrupt if self.interactive else contextlib.nullcontext():
                output = self._generate(inputs, min(room, self.options["max_new_tokens"]), interrupt)
        except KeyboardInterrupt:
            if not interrupt.came:
                raise
            self._say("\nStopped at once: this message is no part of the conversation.")
            return
        elapsed = time.perf_counter() - start
        if type(output.get(CACHE)) is DynamicCache:
            self._read = output.sequences[0].tolist(), output[CACHE]
        tokens = output.sequences[0, length:]
        answer = self.models.tokenizer.decode(tokens, skip_special_tokens=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        record = getattr(output, "speculation", None)
        tau = f"{record.tau:.2f}" if record is not None and record.tau is not None else "-"
        stopped = ", stopped" if interrupt.came else ""
        self._say(f"[tau {tau}, {len(tokens) / elapsed:.1f} tok/s, {len(tokens)} tokens{stopped}]")
        if len(tokens) == room < self.options["max_new_tokens"]:
            self._say(f"The context of {self.models.target_name} ({self.context} tokens) is full: /reset.")

    def _generate(self, inputs: dict, max_new_tokens: int, *criteria: StoppingCriteria):
        return self.models.target.generate(
            **inputs, **self._known(inputs["input_ids"][0].tolist()), assistant_model=self.models.draft,
            **{**self.options, "max_new_tokens": max_new_tokens}, return_dict_in_generate=True,
            streamer=RunStreamer(self.console, self.models.tokenizer, coloured=self.interactive),
            stopping_criteria=StoppingCriteriaList(criteria),
        )  # fmt: skip

    def _known(self, ids: list[int]) -> dict:
        """The last turn's cache, cut to what the conversation `ids` still begins with: an argument of `generate`."""
        if self._read is None:
            return {}
        (before, cache), self._read = self._read, None  # an answer that breaks off leaves it half written
        keep = common_prefix(before, ids) - 1  # the token after the last one kept is known, too
        if keep < 1 or all(cache.is_linear):  # states alone do not say how much they have read
            return {}
        if (gone := cache.get_seq_length() - keep) > 0:
            try:
                cache.crop(-gone)
            except RuntimeError:  # a sliding window has moved on
                return {}
        return {CACHE: cache}

    def _check_template(self) -> None:
        tokenizer, name = self.models.tokenizer, self.models.target_name
        if getattr(tokenizer, "chat_template", None) is None:
            if self.opening:
                raise ValueError(f"{name!r} has no chat template, so it takes no system message: leave system out.")
            self._say(f"{name} has no chat template: each message stands alone.")
            return
        try:
            encode_chat(tokenizer, [*self.opening, {"role": "user", "content": "?"}])
        except Exception as error:  # jinja2's, of any kind that a template raises
            raise ValueError(
                f"The chat template of {name!r} refuses a conversation with this opening: {error}"
            ) from error

    def _say(self, text: str) -> None:
        self.console.out(text, style="yellow" if self.interactive else None, highlight=False)
