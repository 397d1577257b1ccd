"""The requests of a run: number k of a seed is the same whenever it is made."""

import copy
import random
from typing import NamedTuple

from adakv_serve.loadtest.fuzzing.bodies import OF_BYTES, OF_TREE, is_bounded, written
from adakv_serve.loadtest.fuzzing.forms import FORMS, Form
from adakv_serve.loadtest.fuzzing.odd import Raws
from adakv_serve.loadtest.fuzzing.sending import Draft, Sending, content_length
from adakv_serve.loadtest.fuzzing.wire import OF_DRAFT, OF_MANNER, whole

UNCHANGED = "unchanged"
KINDS = (UNCHANGED, *OF_TREE, *OF_BYTES, *OF_DRAFT, *OF_MANNER)
# Further mutations of a request, besides its first.
_MORE = (0, 0, 0, 1, 2)
# The client leaves after this where an answer may take long.
_LONG_S = 3.0


class Target(NamedTuple):
    """What requests name. key: None where the deployment asks for none."""

    model: str
    key: str | None = None


class Attempt(NamedTuple):
    """One fuzzed request. kinds: of its mutations, the first of which names it in the report."""

    seed: int
    number: int
    path: str
    kinds: tuple[str, ...]
    sending: Sending


def attempt(seed: int, number: int, target: Target) -> Attempt:
    """Return request `number` of a seed: the same bytes for equal arguments."""
    rng = random.Random(f"{seed}:{number}")
    form = rng.choice(FORMS)
    chosen = [rng.choice(KINDS)]
    if chosen[0] != UNCHANGED:
        more = [kind for kind in KINDS if kind not in (UNCHANGED, *chosen)]
        chosen += rng.sample(more, rng.choice(_MORE))
    if form.method == "GET":
        # There is no body to mutate.
        chosen = [kind for kind in chosen if kind in OF_DRAFT or kind in OF_MANNER] or [UNCHANGED]
    draft, bounded = _draft(rng, form, chosen, target)
    for kind, change in OF_DRAFT.items():
        if kind in chosen:
            draft = change(rng, draft)
    sending = _sent(rng, draft, chosen)
    # A server may wait for the rest of a body whose length is wrong.
    bounded &= "content-length" not in chosen and "chunks" not in chosen
    if not bounded and sending.leaves_after_s is None:
        sending = sending._replace(leaves_after_s=_LONG_S)
    return Attempt(seed, number, form.path, tuple(chosen), sending)


def _draft(rng: random.Random, form: Form, chosen: list[str], target: Target) -> tuple[Draft, bool]:
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    if target.key is not None:
        headers.append((b"authorization", f"Bearer {target.key}".encode()))
    if form.method == "GET":
        return Draft(b"GET", form.path.encode(), headers, b"", ()), True
    raws = Raws()
    before = {"model": target.model, **rng.choice(form.bodies)}
    body = copy.deepcopy(before)
    for kind, change in OF_TREE.items():
        if kind in chosen:
            change(rng, body, form, raws)
    data = written(body, raws)
    for kind, rewrite in OF_BYTES.items():
        if kind in chosen:
            data = rewrite(rng, data, headers)
    bounded = is_bounded(before, body) and "repeated field" not in chosen
    draft = Draft(b"POST", form.path.encode(), headers, data, (content_length(len(data)),))
    return draft, bounded


def _sent(rng: random.Random, draft: Draft, chosen: list[str]) -> Sending:
    manners = [kind for kind in OF_MANNER if kind in chosen]
    sending = OF_MANNER[manners[0]](rng, draft) if manners else whole(draft)
    return sending._replace(method=draft.method.decode("latin-1"))
