"""Odd values for a field of a JSON body: types, numbers, strings, nesting, width."""

import copy
import random
from typing import Any

Rng = random.Random

STRINGS = (
    "", " ", "\0", "a\0b", "\r\nx-forged: 1", "\x1b[31m", "null", "true", "-1", "NaN", "\u202egnp",
    "\ufeff", "\ud83d", "\udc00\ud800", "🛶" * 40, "e\u0301" * 40, "%s%n%x", "{{ 7*7 }}",
    "{% for i in range(9) %}{{ i }}{% endfor %}", "<|im_start|>system\n<|im_end|>", "<tool_call>",
    "../../etc/passwd", "'; FLUSHALL; --", "\\u0000", "\u2028\u2029", "😀\u200d😀", "<|endoftext|>",
    "x" * 300, "harbour " * 600, "x" * 40_000,
)  # fmt: skip
# As JSON has them; some are beyond what Python, or JSON itself, can express.
NUMBERS = (
    "0", "-0", "-1", "1", "2", "0.5", "1e308", "-1e308", "1e-320", "1e400", "-1e400", "NaN",
    "Infinity", "-Infinity", "2147483647", "2147483648", "4294967296", "9223372036854775807",
    "9223372036854775808", "18446744073709551616", "-9223372036854775809", "1" + "0" * 400,
    "0." + "3" * 400, "1E2", "1.0", "100000", "49151", "49152",
)  # fmt: skip
OTHER_TYPES: tuple[Any, ...] = (
    None, True, False, 0, 3.5, "text", "", [], {}, [[]], [None], [{}], {"": None}, [1, "a", None],
    {"type": "object"}, [True], ["text"], [[1]], {"text": "a"}, [{"type": "text"}],
)  # fmt: skip
_DEPTHS = (20, 200, 1000, 5000, 100_000)
_WIDTHS = (40, 400, 5000)
_MARK = "@raw-{}@"


class Raws:
    """Values that only text can express: they stand in a body as marks until it is written."""

    def __init__(self) -> None:
        self._texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return a string that stands for a piece of JSON."""
        self._texts.append(text)
        return _MARK.format(len(self._texts) - 1)

    def fill(self, text: str) -> str:
        """Return the text of a body with all pieces in their places."""
        for number, raw in enumerate(self._texts):
            text = text.replace(f'"{_MARK.format(number)}"', raw)
        return text


def number(rng: Rng, raws: Raws) -> Any:
    return raws.mark(rng.choice(NUMBERS))


def string(rng: Rng, raws: Raws) -> Any:
    return rng.choice(STRINGS)


def other_type(rng: Rng, raws: Raws) -> Any:
    # Later changes of the body must not reach the constant.
    return copy.deepcopy(rng.choice(OTHER_TYPES))


def nested(rng: Rng, raws: Raws) -> Any:
    """Return lists or objects in each other, some deeper than parsers go."""
    depth = rng.choice(_DEPTHS)
    before, within, after = rng.choice(
        (
            ("[", "", "]"),
            ('{"a":', "1", "}"),
            ('[{"type":"text","content":', "null", "}]"),
            ('{"properties":{"a":', "{}", "}}"),
            ('{"type":"array","items":', "{}", "}"),
        )
    )
    return raws.mark(before * depth + within + after * depth)


def wide(rng: Rng, raws: Raws) -> Any:
    """Return a list or an object with many members."""
    width = rng.choice(_WIDTHS)
    member: Any = rng.choice((1, "a", None, [], {"role": "user", "content": "a"}, 1.5, "🛶"))
    # Each its own: a later change of one that all share would be written as often.
    members = [copy.deepcopy(member) for _ in range(width)]
    if rng.random() < 0.3:
        return {f"key-{at}": one for at, one in enumerate(members)}
    return members


def anything(rng: Rng, raws: Raws) -> Any:
    return rng.choice((number, string, other_type, nested, wide))(rng, raws)
