"""One row of the training data for human eyes: what is trained on, and what is not."""

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

TRAINED = "bold green"


def preview(
    tokenizer: PreTrainedTokenizerBase, ids: torch.LongTensor, mask: torch.BoolTensor, most: int = 400
) -> Text:
    """
    The decoded beginning of a row, its trained tokens in colour and between [[ and ]].

    Args:
        ids, mask (`[length]`): a row and its loss mask.
        most: how many tokens are shown.
    """
    ids, mask = ids[:most].tolist(), mask[:most].tolist()
    text, start = Text(), 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or mask[end] != mask[start]:  # runs, because a character may be several tokens
            part = tokenizer.decode(ids[start:end])
            text.append(f"[[{part}]]" if mask[start] else part, style=TRAINED if mask[start] else "dim")
            start = end
    return text
