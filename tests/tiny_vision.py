"""Tiny models that see: built from configs, with the inputs that their processors would make of images."""

import torch
import transformers as tf

from .tiny import COMMON, LINEAR, MIXED

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip
QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 14,
}
QWEN_IDS = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}

CONFIGS = {
    "gemma3": lambda: tf.Gemma3Config(
        text_config={
            **COMMON, "head_dim": 8, "sliding_window": 6, "query_pre_attn_scalar": 8, "layer_types": MIXED,
        },
        vision_config={**VISION, "model_type": "siglip_vision_model"}, mm_tokens_per_image=4, image_token_index=60,
        boi_token_index=61, eoi_token_index=62,
    ),
    "llava": lambda: tf.LlavaConfig(
        text_config=tf.LlamaConfig(**COMMON), vision_config=tf.CLIPVisionConfig(**VISION, projection_dim=32),
        image_token_index=60,
    ),
    "qwen2_5_vl": lambda: tf.Qwen2_5_VLConfig(
        text_config={**COMMON, "rope_parameters": ROPE},
        vision_config={**QWEN, "window_size": 28, "fullatt_block_indexes": [1]}, **QWEN_IDS,
    ),
    "qwen3_vl": lambda: tf.Qwen3VLConfig(
        text_config={**COMMON, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={**QWEN, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}, **QWEN_IDS,
    ),
    "qwen3_5": lambda: tf.Qwen3_5Config(
        text_config={**COMMON, **LINEAR, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        vision_config={**QWEN, "num_position_embeddings": 16}, **QWEN_IDS,
    ),
    "gemma4": lambda: tf.Gemma4Config(
        text_config={
            **COMMON, "head_dim": 8, "global_head_dim": 8, "sliding_window": 6, "num_hidden_layers": 4,
            "num_kv_shared_layers": 2, "layer_types": MIXED * 2, "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 4,
        },
        vision_config={
            **VISION, "num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 16,
        },
        audio_config=None, image_token_id=60, boi_token_id=61, eoi_token_id=62, video_token_id=63, audio_token_id=59,
        boa_token_id=58, eoa_token_index=57,
    ),
    "smolvlm": lambda: tf.SmolVLMConfig(
        text_config=tf.LlamaConfig(**COMMON), vision_config=VISION, image_token_id=60, scale_factor=2, pad_token_id=0
    ),
    "internvl": lambda: tf.InternVLConfig(
        text_config=tf.Qwen2Config(**COMMON), vision_config=VISION, image_token_id=60, downsample_ratio=0.5
    ),
    "mistral3": lambda: tf.Mistral3Config(
        text_config=tf.MistralConfig(**COMMON, sliding_window=None), vision_config=tf.PixtralVisionConfig(**VISION),
        image_token_index=60, spatial_merge_size=1,
    ),
}  # fmt: skip
RECURRENT = {"qwen3_5"}  # plain in a batch
TOKENS = {"smolvlm": 1, "internvl": 1}  # of an image; 4 elsewhere


def build(name: str):
    """A random model in eval mode; the global generator is left where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tf.AutoModelForImageTextToText.from_config(CONFIGS[name]())
        for parameter in model.parameters():  # some projections begin at zero
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(name: str, images: tuple[int, ...], seed: int = 0) -> dict[str, torch.Tensor]:
    """What a processor makes of left-padded prompts, with so many images each."""
    generator, total, rows = torch.Generator().manual_seed(seed), sum(images), []
    for row, count in enumerate(images):
        text = [1, 17 + row]
        for _ in range(count):
            image = [60] * TOKENS.get(name, 4)
            text += [62, *image, 63, 5] if name.startswith("qwen") else [*image, 5]
        rows.append([*text, 40, 9, 33])
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    made = {"input_ids": ids, "attention_mask": torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])}
    if name == "gemma3":
        made["token_type_ids"] = (ids == 60).long()
    if name.startswith("qwen") or name == "gemma4":
        made["mm_token_type_ids"] = (ids == 60).long()
    if not total:
        return made
    if name.startswith("qwen"):
        patches = torch.randn(16 * total, 3 * 2 * 14 * 14, generator=generator)
        return {**made, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]] * total)}
    if name == "gemma4":
        patches = torch.rand(total, 16, 3 * 14 * 14, generator=generator)
        places = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).repeat(total, 1, 1)
        return {**made, "pixel_values": patches, "image_position_ids": places}
    if name == "smolvlm":
        return {**made, "pixel_values": torch.randn(len(images), max(images), 3, 28, 28, generator=generator)}
    if name == "mistral3":
        made["image_sizes"] = torch.tensor([[28, 28]] * total)
    return {**made, "pixel_values": torch.randn(total, 3, 28, 28, generator=generator)}
