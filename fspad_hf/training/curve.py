"""The curve of a run as a picture: losses, and how good the draft was found to be."""

from pathlib import Path


def write_curve(path: Path, log_history: list[dict]) -> bool:
    """
    An SVG of the loss over the steps and, where there were evaluations, of tau.

    Args:
        log_history: as [`~transformers.TrainerState`] has it.

    Returns:
        Whether it was drawn: not without matplotlib, nor of a run that logged nothing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    losses = [(log["step"], log["loss"]) for log in log_history if "loss" in log]
    if not losses:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss", yscale="log")
    axes.plot(*zip(*losses, strict=True), color="tab:blue", label="loss")
    held_out = [(log["step"], log["eval_loss"]) for log in log_history if "eval_loss" in log]
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o", color="tab:blue", label="loss, held out")
    beside = axes.twinx()
    beside.set_ylabel("tau, held out")
    for name, label, color in (("tau", "tau", "tab:green"), ("coupled_tau", "tau at T = 1", "tab:olive")):
        found = [(log["step"], log[f"eval_{name}"]) for log in log_history if f"eval_{name}" in log]
        if found:
            beside.plot(*zip(*found, strict=True), "o-", color=color, label=label)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="svg")
    partial.replace(path)
    return True
