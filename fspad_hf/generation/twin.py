"""Other module objects over a model's weights, for forwards of a few rows."""

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .few_rows import FewRowsLinear, has_choice


def twin(model: PreTrainedModel, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """
    A model of new module objects that share parameters, buffers, hooks and settings with those of `model`; on a CPU
    its linear layers are [`FewRowsLinear`]. The model itself, which other threads may be using, is left as it is.
    Cheap enough for each call.

    Args:
        config: in place of the text configuration.
    """
    text, made = model.config.get_text_config(), {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            new = made[id(module)] = object.__new__(type(module))
            vars(new).update(vars(module))
            if config is not None and vars(module).get("config") is text:
                vars(new)["config"] = config
            if type(module) is nn.Linear and has_choice(module.weight):
                new.__class__ = FewRowsLinear
            children = module._modules.items()
            vars(new)["_modules"] = {name: None if child is None else copied(child) for name, child in children}
        return made[id(module)]

    return copied(model)


def can_have_twin(model: PreTrainedModel) -> bool:
    """
    Whether forwards leave nothing behind in modules that their twins would miss: no `forward` bound to its module, as
    accelerate and compilers leave one, and no rotary frequencies that turn with the length.
    """
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kinds = {part.get("rope_type") for part in (rope, *rope.values()) if isinstance(part, dict)}
    return not kinds & {"dynamic", "longrope"} and not any("forward" in vars(module) for module in model.modules())
