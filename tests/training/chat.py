"""Chat templates of several families, and a tokenizer of one character a token for each."""

import json

import torch
import transformers as tf

from fspad_hf.training.templates import derive_glue

from .. import tiny

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nbe nice<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_TAGGED = CHATML.replace(
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n",
    "{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}<|im_end|>"
    "{% endgeneration %}{{ '\n' }}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}",
)
LLAMA3 = (
    "<|begin|>{% for m in messages %}<|header|>{{ m['role'] }}<|end_header|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end_header|>\n\n{% endif %}"
)
GEMMA = (
    "<bos>{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}[/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)

TEMPLATES = {  # template, special tokens (EOS first)
    "chatml": (CHATML, ["<|im_end|>", "<|im_start|>"]),
    "tagged": (CHATML_TAGGED, ["<|im_end|>", "<|im_start|>"]),
    "llama3": (LLAMA3, ["<|eot|>", "<|begin|>", "<|header|>", "<|end_header|>"]),
    "gemma": (GEMMA, ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]),
    "mistral": (MISTRAL, ["</s>", "<s>", "[INST]", "[/INST]"]),
}
CHAT = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "yes?"},
    {"role": "user", "content": "why"},
    {"role": "assistant", "content": "so \n.  so"},
]
CHARACTERS = "abcdefghijklmnopqrstuvwxyz \n.,?!:;'-_0123456789ABCDEFGH"


def chat_tokenizer(family: str, template: str | None = None):
    """A token for each of [`CHARACTERS`] and each of the family's special tokens; 64 ids at most."""
    from tokenizers import Tokenizer, decoders, models

    known, special = TEMPLATES[family]
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(CHARACTERS)}, [], unk_token="_"))
    made.decoder = decoders.Fuse()
    made.add_special_tokens(special)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=special[0], unk_token="_", chat_template=template or known
    )


SPEECH = 3.0  # how much likelier than the rest a turn's end is made, so that short rows hold several turns


def talker(name: str = "llama", family: str = "chatml", attention: str = "sdpa"):
    """A tiny target that ends its turns now and then, and the tokenizer of a family."""
    tokenizer = chat_tokenizer(family)
    model = tiny.build(name, attention)
    stops = {tokenizer.eos_token_id, derive_glue(tokenizer).to_assistant[0], derive_glue(tokenizer).to_user[0]}
    head = model.get_output_embeddings()
    with torch.no_grad():  # a bias on the ends of turns, where tiny heads have none
        bias = torch.zeros(head.weight.shape[0])
        bias[list(stops)] = SPEECH
        head.bias = torch.nn.Parameter(bias)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


def write_chats(path, count=30):
    words = ["hi", "why", "so what", "and then?", "a long one, not too long", "ok"]
    chats = [
        [{"role": ("user", "assistant")[i % 2], "content": f"{words[(n + i) % 6]} {n}"} for i in range(2 + n % 3)]
        for n in range(count)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return chats


def saved_target(path, tokenizer):
    model = tiny.build("llama")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = 0
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model
