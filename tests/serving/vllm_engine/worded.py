"""A tiny model whose tokens are words, for tests that ask a replica's app in text."""

from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.adakv_worker.engines import VOCABULARY, make_tiny_model

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }} "
    "{% if twice %}{{ message['content'] }} {% endif %}{% endfor %}"
)


def words(count: int, first: int = 0) -> str:
    return " ".join(f"w{number % 300}" for number in range(first, first + count))


def make_worded_model(folder: Path) -> Path:
    """Save a tiny model whose tokens are words: `w0`, `w1`, ..."""
    make_tiny_model(folder, heads=6, kv_heads=2)
    vocabulary = {f"w{number}": number for number in range(VOCABULARY - 1)}
    vocabulary["<unk>"] = VOCABULARY - 1
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return folder
