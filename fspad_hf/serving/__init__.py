"""A draft in other engines than `generate`."""


def register_vllm():
    """What vLLM calls in each of its processes (entry point `vllm.general_plugins`): names the class."""
    from vllm import ModelRegistry

    from .. import configuration_fspad  # noqa: F401 -- AutoConfig knows a draft's config from here on

    for name in ("FSPADDraftModel", "EagleFSPADDraftModel"):  # vLLM asks by the one, then by the other
        ModelRegistry.register_model(name, "fspad_hf.serving.vllm:EagleFSPADDraftModel")
