"""What differs between the versions of transformers that are supported."""

import inspect

from transformers import GenerationMixin

# The name under which models take and return their cache: "cache" from 5.24 on.
CACHE = "past_key_values"
if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters:
    CACHE = "cache"
