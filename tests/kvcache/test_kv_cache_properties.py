"""Random lives of sequences against a model that remembers what is written into every block.

The model is a memory: computing a token writes all that its keys and values depend on (salt and every token up to it)
into its slot of its block. Then the rules that matter are one line each: what a sequence may still look at is what it,
or somebody with the same past, wrote; and the free blocks are those in nobody's table.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llm_engine.core.request import BlockHash
from llm_engine.kvcache.block_hash import hash_blocks
from llm_engine.kvcache.kv_cache_manager import KVCacheManager, OutOfBlocks
from llm_engine.kvcache.prefix_cache import PrefixMatch
from llm_engine.kvcache.view import KVView

BLOCK = 2
TOKENS = st.lists(st.integers(0, 1), min_size=1, max_size=9)
SALTS = st.sampled_from([None, None, None, b"salt"])


@dataclass
class Life:
    """One sequence as the model sees it."""

    salt: bytes | None
    tokens: list[int]
    computed: int
    table: list[int]
    steps: set[int] = field(default_factory=set)
    """Steps that published what it found or made."""
    hashes: list[BlockHash] = field(default_factory=list)

    def past(self, position):
        return (self.salt, *self.tokens[: position + 1])


class Lives(RuleBasedStateMachine):
    window: int | None = None
    caching = True

    def __init__(self):
        super().__init__()
        self.lives: dict[int, Life] = {}
        self.memory: dict[tuple[int, int], tuple] = {}
        self.published: dict[int, tuple[BlockHash, int]] = {}
        self.waiting: dict[int, tuple[list[BlockHash], int]] = {}
        """Hashes and tokens of those who look at the cache again and again."""
        self.next_id = self.step = 0

    @initialize(num_blocks=st.integers(4, 10))
    def start(self, num_blocks):
        self.kv = KVCacheManager(num_blocks, BLOCK, enable_prefix_caching=self.caching, sliding_window=self.window)
        self.view = KVView(self.kv)

    # -- the model

    def first_seen(self, position):
        return 0 if self.window is None else max(0, position - self.window + 1)

    def expected_hit(self, hashes, num_tokens):
        """Most tokens such that every block the first query looks at is published."""
        if not self.caching:
            return 0
        known = {block_hash for block_hash, _ in self.published.values()}
        usable = [0]
        for n in range(1, min(len(hashes), (num_tokens - 1) // BLOCK) + 1):
            first = self.first_seen(n * BLOCK) // BLOCK
            if all(block_hash in known for block_hash in hashes[min(first, n - 1) : n]):
                usable.append(n)
        if self.window is None:  # a chain: nothing is found behind a miss
            usable = [n for n in usable if all(m in usable for m in range(n))]
        return max(usable) * BLOCK

    def took(self, life, blocks):
        for block in blocks:
            assert block != 0
            assert not any(block in other.table for other in self.lives.values())
            self.published.pop(block, None)
            for offset in range(BLOCK):
                self.memory.pop((block, offset), None)
        life.table += blocks

    def let_window_pass(self, life, position):
        if self.window is not None:
            for index in range(min(len(life.table), self.first_seen(position) // BLOCK)):
                life.table[index] = 0

    def compute(self, seq_id, count):
        """The sequence's next ``count`` tokens are computed by a new step; its table reaches them already."""
        life = self.lives[seq_id]
        self.step += 1
        for position in range(life.computed, life.computed + count):
            for seen in range(self.first_seen(position), position):
                assert self.memory[life.table[seen // BLOCK], seen % BLOCK] == life.past(seen)
            self.memory[life.table[position // BLOCK], position % BLOCK] = life.past(position)
        life.computed += count
        hash_blocks(life.tokens, BLOCK, known=life.hashes, extra=life.salt)
        self.kv.publish(seq_id, life.hashes, life.computed, self.step)
        if self.caching:
            for block, block_hash in zip(life.table, life.hashes[: life.computed // BLOCK], strict=False):
                if block and block not in self.published:
                    self.published[block] = block_hash, self.step
                    life.steps.add(self.step)

    def forget(self, seq_id):
        self.kv.free(seq_id)
        del self.lives[seq_id]

    # -- what happens

    def add(self, tokens, salt, read_prefix=True):
        seq_id, self.next_id = self.next_id, self.next_id + 1
        hashes = hash_blocks(tokens, BLOCK, extra=salt)
        expected = self.expected_hit(hashes, len(tokens)) if read_prefix else 0
        match = self.kv.match_prefix(hashes, len(tokens)) if read_prefix else PrefixMatch()
        found = self.kv.add_sequence(seq_id, hashes, len(tokens), read_prefix=read_prefix)
        assert found == match.num_tokens == expected
        table = self.kv.block_ids(seq_id)
        assert tuple(block for block in table if block) == match.block_ids
        life = self.lives[seq_id] = Life(salt, tokens, found, table, hashes=hashes)
        for position in range(self.first_seen(found), found):
            assert self.memory[table[position // BLOCK], position % BLOCK] == life.past(position)
        life.steps.update(self.published[block][1] for block in match.block_ids)
        return seq_id

    @rule(tokens=TOKENS, salt=SALTS, read_prefix=st.sampled_from([True, True, True, False]))
    def arrive(self, tokens, salt, read_prefix):
        self.add(tokens, salt, read_prefix)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), count=st.integers(1, 6), exact=st.booleans())
    def chunk(self, data, count, exact):
        seq_id = data.draw(st.sampled_from(sorted(self.lives)))
        life = self.lives[seq_id]
        count = min(count, len(life.tokens) - life.computed)
        target, computed = life.computed + count, life.computed if exact else None
        needed = self.kv.blocks_to_grow(seq_id, target, computed)
        before = self.kv.num_free_blocks
        if needed > before:
            state = (list(life.table), before, list(self.kv.pool.free_blocks()))
            with pytest.raises(OutOfBlocks):
                self.kv.grow(seq_id, target, computed)
            assert state == (self.kv.block_ids(seq_id), self.kv.num_free_blocks, list(self.kv.pool.free_blocks()))
            return
        self.grow(seq_id, target, computed)
        assert before - self.kv.num_free_blocks <= needed
        assert self.kv.num_held(seq_id) <= self.kv.peak_blocks(len(life.tokens), max(6, BLOCK))
        if exact:
            assert self.kv.num_held(seq_id) == self.kv.blocks_for(max(target, len(life.table) * BLOCK), life.computed)
        self.compute(seq_id, count)

    def grow(self, seq_id, target, computed):
        life = self.lives[seq_id]
        blocks = self.kv.grow(seq_id, target, computed)
        if computed is None:  # it may let go of less than it could, never of more
            kept = self.kv.block_ids(seq_id)[: len(life.table)]
            assert all(new == old for new, old in zip(kept, life.table, strict=True) if new)
            life.table = kept
        else:
            self.let_window_pass(life, computed)
        self.took(life, blocks)

    @precondition(lambda self: any(life.computed == len(life.tokens) for life in self.lives.values()))
    @rule(data=st.data(), token=st.integers(0, 1))
    def decode(self, data, token):
        ready = sorted(i for i, life in self.lives.items() if life.computed == len(life.tokens))
        seq_id = data.draw(st.sampled_from(ready))
        life = self.lives[seq_id]
        if life.computed == len(life.table) * BLOCK:
            if self.kv.blocks_to_advance([seq_id]) > self.kv.num_free_blocks:
                with pytest.raises(OutOfBlocks):
                    self.kv.grow_by_one(seq_id)
                return
            block = self.kv.grow_by_one(seq_id)
            self.let_window_pass(life, life.computed)
            self.took(life, [block])
        life.tokens.append(token)
        self.compute(seq_id, 1)

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def end(self, data):
        seq_id = data.draw(st.sampled_from(sorted(self.lives)))
        self.forget(seq_id)
        with pytest.raises(KeyError):
            self.kv.free(seq_id)

    @rule(back=st.integers(0, 3))
    def fail_step(self, back):
        step = self.step - back
        hit = sorted(i for i, life in self.lives.items() if any(s >= step for s in life.steps))
        assert self.kv.withdraw(step) == hit
        self.published = {b: (h, s) for b, (h, s) in self.published.items() if s < step}
        for seq_id in hit:
            self.forget(seq_id)

    @rule()
    def restart(self):
        for seq_id in sorted(self.lives):
            self.forget(seq_id)
        self.kv.reset_prefix_cache()
        self.published.clear()

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=15), salt=SALTS)
    def wait(self, tokens, salt):
        self.waiting[2000 + len(self.waiting)] = hash_blocks(tokens, BLOCK, extra=salt), len(tokens)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def look(self, data):
        """What is remembered of some, however long ago they looked last, is what a walk would find."""
        for request_id in data.draw(st.sets(st.sampled_from(sorted(self.waiting)))):
            hashes, num_tokens = self.waiting[request_id]
            match = self.view.prefix(request_id, hashes, num_tokens)
            assert match == self.kv.match_prefix(hashes, num_tokens)
            assert match.num_tokens == self.expected_hit(hashes, num_tokens)
            assert self.view.prefix(request_id, hashes, num_tokens) is match

    @rule(data=st.data(), always_match=st.booleans())
    def schedule(self, data, always_match):
        """A plan made through the view can be carried out, and takes no more than was predicted."""
        self.view.begin_pass()
        pauses, starts, growths = [], [], {}
        undecided = sorted(self.lives)
        for _ in range(data.draw(st.integers(1, 5))):
            kind = data.draw(st.sampled_from(["pause", "grow", "start", "start"]))
            if kind == "start":
                tokens, salt = data.draw(TOKENS), data.draw(SALTS)
                match = self.view.prefix(1000, hash_blocks(tokens, BLOCK, extra=salt), len(tokens))
                self.view.forget(1000)
                target = data.draw(st.integers(match.num_tokens + 1, len(tokens)))
                cost = self.view.blocks_to_start(match, target)
                assert cost == self.view.blocks_to_start(match, target)
                if cost <= self.view.free_blocks:
                    told = always_match or data.draw(st.booleans())
                    self.view.reserve(cost, match if told else None)
                    starts.append((tokens, salt, match.num_tokens, target))
            elif undecided:
                seq_id = data.draw(st.sampled_from(undecided))
                if kind == "pause":
                    undecided.remove(seq_id)
                    self.view.release(seq_id)
                    pauses.append(seq_id)
                    continue
                life = self.lives[seq_id]
                target = life.computed + data.draw(st.integers(0, len(life.tokens) - life.computed))
                cost = self.view.blocks_to_grow(seq_id, target, life.computed)
                assert cost == self.view.blocks_to_grow(seq_id, target, life.computed)
                if cost <= self.view.free_blocks:
                    undecided.remove(seq_id)
                    self.view.reserve(cost)
                    growths[seq_id] = target
        predicted = self.view.free_blocks
        assert predicted >= 0
        exact = self.window is None and always_match and not pauses
        for seq_id in pauses:
            self.forget(seq_id)
        for tokens, salt, found, target in starts:
            seq_id = self.add(tokens, salt)
            assert self.lives[seq_id].computed == found
            growths[seq_id] = target
        for seq_id in data.draw(st.permutations(sorted(growths))):
            computed = self.lives[seq_id].computed
            self.grow(seq_id, growths[seq_id], computed)
        free = self.kv.num_free_blocks
        assert free == predicted if exact else free >= predicted
        for seq_id, target in growths.items():
            self.compute(seq_id, target - self.lives[seq_id].computed)

    @invariant()
    def sound(self):
        if not hasattr(self, "kv"):
            return
        self.kv.check_integrity()
        held = {block for life in self.lives.values() for block in life.table if block}
        assert self.kv.num_free_blocks == self.kv.num_usable_blocks - len(held)
        assert {b: (h, self.kv.cache.step_of[b]) for b, h in enumerate(self.kv.cache.hash_of) if h} == self.published
        for seq_id, life in self.lives.items():
            assert self.kv.block_ids(seq_id) == life.table
            assert self.kv.num_held(seq_id) == sum(map(bool, life.table))
            for position in range(self.first_seen(life.computed), life.computed):
                assert self.memory[life.table[position // BLOCK], position % BLOCK] == life.past(position)


class WindowedLives(Lives):
    window = 5


class NarrowLives(Lives):
    window = 1


class UncachedLives(Lives):
    caching = False


class UncachedWindowedLives(Lives):
    window, caching = 4, False


def case(machine, examples):
    test = machine.TestCase
    test.settings = settings(max_examples=examples, stateful_step_count=25, deadline=None, derandomize=True)
    return test


TestLives = case(Lives, 120)
TestWindowedLives = case(WindowedLives, 120)
TestNarrowLives = case(NarrowLives, 30)
TestUncachedLives = case(UncachedLives, 30)
TestUncachedWindowedLives = case(UncachedWindowedLives, 40)
