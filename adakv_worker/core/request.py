"""One request of the engine core: its plan, and how far compression has come."""

import enum
from dataclasses import dataclass, replace

from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.core.floor import Floor
from adakv_worker.core.held import Held, ToHold
from adakv_worker.core.plan import Life, Plan


class Phase(enum.Enum):
    """What a request's blocks are.

    PREFILL: ordinary blocks; it is compressed when its prompt is complete.
    RESUMED: slabs of a held cache; its prompt's rest is computed, and then compressed.
    RESERVED: its prompt's blocks, followed by its slabs, for one step.
    COMPRESSED: slabs.
    WHOLE: ordinary blocks to its end.
    """

    PREFILL = enum.auto()
    RESUMED = enum.auto()
    RESERVED = enum.auto()
    COMPRESSED = enum.auto()
    WHOLE = enum.auto()


@dataclass(slots=True)
class CompressedRequest:
    """The plan of one request, and its state. Only `AdaKVManager` calls what changes it.

    num_tokens: tokens that it has blocks for.
    room_tokens: tokens that its slabs hold while it does not evict; 0 before it has any.
    floor: how far its compressed cache can be cut back; None before it has one.
    compressed_at: tokens at the last compression or eviction that dropped entries.
    failed: whether its policy has raised an error.
    """

    plan: Plan
    phase: Phase
    num_tokens: int = 0
    room_tokens: int = 0
    floor: Floor | None = None
    compressed_at: int = 0
    failed: bool = False

    @classmethod
    def planned(cls, plan: Plan) -> "CompressedRequest":
        """Return a request that is about to compute its prompt."""
        if plan.resumed is not None:
            past = plan.resumed
            return cls(plan, Phase.RESUMED, floor=past.floor, compressed_at=past.compressed_at)
        return cls(plan, Phase.PREFILL if plan.active else Phase.WHOLE)

    @classmethod
    def arriving(cls, plan: Plan, num_tokens: int) -> "CompressedRequest":
        """Return a request that arrives with its compressed cache and so many tokens."""
        entries = plan.entries_at(num_tokens)
        # What of its cache is exact is not known here, but its next tokens will be.
        return cls(plan, Phase.COMPRESSED, num_tokens, 0, Floor(num_tokens, entries), num_tokens)

    @property
    def has_slabs(self) -> bool:
        """Whether its blocks are slabs alone."""
        return self.phase in (Phase.RESUMED, Phase.COMPRESSED)

    @property
    def completes_prompt(self) -> bool:
        """Whether the step that it has blocks for completes its prompt, which is compressed."""
        compressible = self.phase in (Phase.PREFILL, Phase.RESUMED)
        return compressible and self.num_tokens >= self.plan.prompt_tokens

    @property
    def start_tokens(self) -> int:
        """Its tokens when it starts."""
        compressed = self.phase is Phase.COMPRESSED
        return self.num_tokens if compressed else self.plan.prompt_tokens

    @property
    def blocks_to_start(self) -> int:
        """Blocks that it holds at the end of its prefill, or that its arriving cache takes."""
        if self.phase is Phase.COMPRESSED:
            return self.plan.blocks_at(self.num_tokens)
        if self.phase is Phase.RESUMED:
            return self.plan.blocks_to_extend
        return self.plan.prompt_blocks + (self.plan.slabs if self.plan.active else 0)

    def blocks_at(self, num_tokens: int) -> int:
        """Return the slabs that surely hold it at `num_tokens` tokens."""
        if self.phase is Phase.RESUMED:
            return self.plan.extended_blocks(num_tokens)
        return self.plan.blocks_at(num_tokens)

    @property
    def evicts(self) -> bool:
        """Whether the step that it has blocks for ends with an eviction."""
        return self.plan.evicts_at(self.num_tokens)

    @property
    def next_eviction(self) -> int | None:
        """Its tokens at the eviction after this step; None if there is none."""
        return self.plan.next_eviction(self.num_tokens)

    @property
    def life(self) -> Life:
        return self.plan.life_at(self.num_tokens)

    def may_grow_within(self, more: int) -> bool:
        """Return whether it may need another block for its next `more` tokens."""
        if self.num_tokens + more <= self.room_tokens:
            return False
        return self.plan.bound is None or self.plan.grows_within(self.num_tokens, more)

    def grow(self, num_tokens: int) -> None:
        """Note that it gets blocks for so many tokens."""
        assert num_tokens >= self.num_tokens, "a request has lost tokens"
        self.num_tokens = num_tokens

    def stay_whole(self, reason: str) -> None:
        """Give up compressing it: PREFILL becomes WHOLE."""
        self._leave(Phase.PREFILL, Phase.WHOLE)
        self.plan = replace(self.plan, skipped=reason)

    def hold(self, slabs: int) -> None:
        """Note the number of slabs that it holds after growing or evicting."""
        if self.phase is Phase.RESUMED:
            return
        assert self.phase is Phase.COMPRESSED, f"a request holds slabs while {self.phase.name}"
        self.room_tokens = self.plan.room_in(slabs, self.num_tokens)

    def reserve(self) -> None:
        """Note its slabs beside its complete prompt: PREFILL becomes RESERVED."""
        assert self.num_tokens >= self.plan.prompt_tokens, "the prompt is not complete"
        self._leave(Phase.PREFILL, Phase.RESERVED)

    def compress(self, slabs: int) -> None:
        """Note that only its kept entries are left: RESERVED or RESUMED becomes COMPRESSED."""
        plan = self.plan
        self._leave(self.phase if self.phase is Phase.RESUMED else Phase.RESERVED, Phase.COMPRESSED)
        resumed = plan.resumed
        if resumed is None or resumed.among is None or resumed.keep < resumed.among:
            choice = plan.choice if resumed is None else resumed.choice
            self._note_cut(plan.prompt_tokens, plan.keep, choice)
        self.hold(slabs)

    def note_eviction(self, slabs: int) -> None:
        """Note the slabs that it holds after the eviction that its last step ended with."""
        assert self.plan.bound is not None
        self._note_cut(self.num_tokens, self.plan.bound.budget_tokens, self.plan.choice)
        self.hold(slabs)

    def _note_cut(self, num_tokens: int, entries: int, choice: PolicyChoice) -> None:
        # The window's entries stay whole; a policy that failed has none.
        most = min(num_tokens, self.plan.keep)
        window = 0 if self.failed else min(choice.build().scorer.window_tokens, most)
        self.floor = Floor(num_tokens - window, entries - window)
        self.compressed_at = num_tokens

    def fall_back(self) -> None:
        """Note that its policy raised an error, and another one chose its entries."""
        self.failed = True
        self.plan = replace(self.plan, fallback=f"policy '{self.plan.choice.preset}' failed")
        if self.floor is not None and self.floor.tokens < self.compressed_at:
            entries = self.floor.entries_at(self.compressed_at)
            self.floor = Floor(self.compressed_at, entries)

    def leaves(self, to_hold: ToHold, name: str, block_size: int) -> Held | None:
        """Return the cache that it leaves when it ends or pauses, without blocks; None without one.

        Args:
            name: the cache's name for the workers.
        """
        known = min(len(to_hold.token_ids), to_hold.entry_tokens)
        if not self.has_slabs or self.floor is None or known < self.floor.tokens:
            return None
        resumed = self.plan.resumed
        return Held(
            name, to_hold.scope, to_hold.token_ids[:known], to_hold.entry_tokens, self.floor,
            self.compressed_at, (), resumed.turn if resumed is not None else 1,
            tuple(to_hold.block_hashes[: known // block_size]), has_session=to_hold.has_session,
            cache_salt=to_hold.cache_salt, has_adapter=to_hold.has_adapter,
        )  # fmt: skip

    def _leave(self, phase: Phase, to: Phase) -> None:
        assert self.phase is phase, f"a request became {to.name} while {self.phase.name}"
        self.phase = to
