"""Other module objects over a model's weights, for forwards of a few rows."""

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from .prepacked import PackedLinear, PackedWeight


def twin(
    model: PreTrainedModel, packed: Mapping[int, PackedWeight] | None = None, config: PreTrainedConfig | None = None
) -> PreTrainedModel:
    """
    A model of new module objects that share parameters, buffers, hooks and settings with those of `model`, but for
    what is given. The model itself, which other threads may be using, is left as it is. Cheap enough for each call.

    Args:
        packed: by the id of a linear layer's weight, what its product is to run on.
        config: in place of the text configuration.
    """
    text, made = model.config.get_text_config(), {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            new = made[id(module)] = object.__new__(type(module))
            vars(new).update(vars(module))
            if config is not None and vars(module).get("config") is text:
                vars(new)["config"] = config
            found = (packed or {}).get(id(module._parameters.get("weight")))
            if found is not None and type(module) is nn.Linear:
                new.__class__ = PackedLinear
                vars(new)["packed"] = found.packed
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
