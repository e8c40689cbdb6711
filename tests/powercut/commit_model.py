"""The commit protocol as a small machine, explored completely: states, links, evictions, failures, crashes, two waiters.

Three clusters; 0 and 1 belong to table A, which L1 names from the start, 2 to table B, which is new. Everything the
machine may do next is one step, and a power cut may come after each. The disk is kept as what is durable of each place
and the set of versions that may have come there since the last flush. No code is shared with qedfs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

A, B = 0, 1
TABLE_OF = (A, A, B)
FULL = frozenset({0, 1, 2})
Set = frozenset[int]
NONE: Set = frozenset()
GARBAGE: Set = frozenset({-1})
"""What a new table's place holds until zeros are written there."""


class Place(NamedTuple):
    """One place of the file that is written at once."""

    durable: Set
    written: tuple[Set, ...] = ()
    """Since the last flush, oldest first."""

    @property
    def seen(self) -> Set:
        """What a read finds: the page cache."""
        return self.written[-1] if self.written else self.durable

    @property
    def possible(self) -> tuple[Set, ...]:
        """What may be there after a power cut."""
        return self.durable, *self.written

    def put(self, content: Set) -> Place:
        return self if content == self.seen else Place(self.durable, (*self.written, content))

    def flushed(self) -> Place:
        return Place(self.seen)


class Memory(NamedTuple):
    """A table in memory."""

    entries: Set
    dirty: Set = NONE
    pins: int = 0
    named: bool = True


class Waiter(NamedTuple):
    """One fsync: what it must make durable, and where it is: new, queued, running, done or failed."""

    where: str = "new"
    promised: Set = NONE


class State(NamedTuple):
    """The whole machine."""

    data: tuple[Place, ...] = (Place(NONE),) * 3
    linked: Set = NONE
    tables: tuple[Place, Place] = (Place(NONE), Place(GARBAGE))
    l1: Place = Place(frozenset({A}))
    memory: tuple[Memory | None, Memory | None] = (None, None)
    step: str = "idle"
    snapshot: tuple[tuple[int, Set, Set], ...] = ()
    """Table, its entries as they were copied, and which of them were marked."""
    waiters: tuple[Waiter, Waiter] = (Waiter(), Waiter())
    failures: int = 1
    crashes: int = 1


class Broken(AssertionError):
    """An invariant does not hold. The text says which, and how the machine came there."""


def explore(mutation: str = "", *, failures: int = 1, crashes: int = 0, depth: int = 1000) -> tuple[int, int]:
    """Go breadth-first through all states up to `depth` steps; return how many there are and how deep they lie.

    At most so many writes fail and so many power cuts are lived through. What a power cut may leave is judged in every
    state all the same.

    Raises:
        Broken: with the shortest way there.
    """
    start = State(failures=failures, crashes=crashes)
    came: dict[State, tuple[State, str] | None] = {start: None}
    queue = deque([(start, 0)])
    deepest = 0
    while queue:
        state, far = queue.popleft()
        deepest = max(deepest, far)
        if problem := _problem(state):
            way = []
            at: tuple[State, str] | None = came[state]
            while at is not None:
                way.append(at[1])
                at = came[at[0]]
            raise Broken(f"{problem}: {', '.join(reversed(way))}")
        if far == depth:
            continue
        for word, after in _steps(state, mutation):
            # Which of the two waiters is which makes no difference.
            after = after._replace(waiters=tuple(sorted(after.waiters, key=_rank)))  # type: ignore[arg-type]
            if after not in came:
                came[after] = (state, word)
                queue.append((after, far + 1))
    return len(came), deepest


def _rank(waiter: Waiter) -> tuple[str, list[int]]:
    return waiter.where, sorted(waiter.promised)


def _problem(s: State) -> str:
    """Return the invariant that a state breaks."""
    for l1 in s.l1.possible:
        for table in l1:
            for entries in s.tables[table].possible:
                if entries == GARBAGE:
                    return "L1 names a table that is not there"
                if any(s.data[c].possible != (frozenset({c}),) for c in entries):
                    return "an entry may be on the disk without its data"
    for waiter in s.waiters:
        if waiter.where == "done":
            for cluster in waiter.promised:
                table = TABLE_OF[cluster]
                there = all(table in l1 for l1 in s.l1.possible)
                if not there or any(cluster not in entries for entries in s.tables[table].possible):
                    return "an acknowledged link may be lost"
    for cluster in s.linked:
        memory = s.memory[TABLE_OF[cluster]]
        if cluster not in (memory.entries if memory else s.tables[TABLE_OF[cluster]].seen):
            return "a link is forgotten"
    return ""


def _steps(s: State, mutation: str) -> Iterator[tuple[str, State]]:
    yield from _guest(s, mutation)
    yield from _commit(s, mutation)
    if s.crashes:
        yield from _crash(s)


def _guest(s: State, mutation: str) -> Iterator[tuple[str, State]]:
    for cluster in FULL - s.linked:
        place = s.data[cluster]
        table = TABLE_OF[cluster]
        memory = s.memory[table]
        if not place.seen:
            yield f"write {cluster}", s._replace(data=_with(s.data, cluster, place.put(frozenset({cluster}))))
        elif memory is not None:
            more = frozenset({cluster})
            linked = memory._replace(entries=memory.entries | more, dirty=memory.dirty | more)
            yield f"link {cluster}", s._replace(linked=s.linked | more, memory=_with(s.memory, table, linked))
    for table, memory in enumerate(s.memory):
        if memory is None:
            if table in s.l1.seen:
                loaded = Memory(s.tables[table].seen)
                yield f"load {'AB'[table]}", s._replace(memory=_with(s.memory, table, loaded))
            else:
                zeros = _with(s.tables, table, s.tables[table].put(NONE))
                made = s._replace(memory=_with(s.memory, table, Memory(NONE, named=False)))
                yield f"make {'AB'[table]}", made if mutation.startswith("no zeros") else made._replace(tables=zeros)
        elif memory.named and not memory.dirty and (not memory.pins or mutation == "evicted while committed"):
            yield f"evict {'AB'[table]}", s._replace(memory=_with(s.memory, table, None))
    for number, waiter in enumerate(s.waiters):
        if waiter.where == "new":
            where = "running" if s.step != "idle" and mutation == "waiter joins a running commit" else "queued"
            yield f"fsync {number}", s._replace(waiters=_with(s.waiters, number, Waiter(where, s.linked)))


def _commit(s: State, mutation: str) -> Iterator[tuple[str, State]]:
    if s.step == "idle":
        if any(w.where == "queued" for w in s.waiters):
            yield "snapshot", _snapshot(s)
        return
    entries = ("flush 2", "tables") if mutation != "entries before data" else ("tables", "flush 2")
    order = [*entries, "flush 4", "l1", "flush 5"]
    if mutation == "L1 before the table":
        order = ["l1", *entries, "flush 4", "flush 5"]
    if mutation.startswith("no flush"):
        order.remove(mutation.removeprefix("no "))
    if mutation == "no zeros, no flush 4":
        order.remove("flush 4")
    names = frozenset(table for table, _, _ in s.snapshot if (m := s.memory[table]) is not None and not m.named)
    if not names:
        order = [step for step in order if step not in ("flush 4", "l1")]
    step = order[0] if s.step == "begin" else s.step
    if step not in order:
        yield "end", _end(s, failed=False, back=False)
        return
    later = order.index(step) + 1
    following = s._replace(step=order[later] if later < len(order) else "end")
    if step.startswith("flush"):
        after = following._replace(
            data=tuple(p.flushed() for p in s.data),
            tables=(s.tables[A].flushed(), s.tables[B].flushed()),
            l1=s.l1.flushed(),
        )
    elif step == "tables":
        after = following
        for table, content, marked in s.snapshot:
            if marked:
                after = after._replace(tables=_with(after.tables, table, after.tables[table].put(content)))
    else:
        after = following._replace(l1=s.l1.put(s.l1.seen | names))
    if s.failures and not step.startswith("flush"):
        # What of a write that fails came to the disk is in doubt: all of it, or nothing.
        for word, reached in (("fails", s), ("fails after its effect", after)):
            yield f"{step} {word}", _end(reached, failed=True, back=mutation != "marks not given back")
    yield step, _end(after, failed=False, back=False) if after.step == "end" else after


def _snapshot(s: State) -> State:
    taken = []
    for table, memory in enumerate(s.memory):
        if memory is not None and (memory.dirty or not memory.named):
            taken.append((table, memory.entries, memory.dirty))
            clean = memory._replace(dirty=NONE, pins=memory.pins + 1)
            s = s._replace(memory=_with(s.memory, table, clean))
    waiters = tuple(w._replace(where="running") if w.where == "queued" else w for w in s.waiters)
    return s._replace(step="begin" if taken else "flush 5", snapshot=tuple(taken), waiters=waiters)  # type: ignore[arg-type]


def _end(s: State, *, failed: bool, back: bool) -> State:
    for table, _, marked in s.snapshot:
        memory = s.memory[table]
        if memory is not None:
            dirty = memory.dirty | marked if back else memory.dirty
            named = memory.named or not failed
            s = s._replace(
                memory=_with(s.memory, table, memory._replace(dirty=dirty, named=named, pins=memory.pins - 1))
            )
    waiters = tuple(w._replace(where="failed" if failed else "done") if w.where == "running" else w for w in s.waiters)
    if failed:
        # Its caller asks again, as a guest does: the second answer must hold.
        waiters = tuple(w._replace(where="new") if w.where == "failed" else w for w in waiters)
    return s._replace(step="idle", snapshot=(), waiters=waiters, failures=s.failures - failed)  # type: ignore[arg-type]


def _crash(s: State) -> Iterator[tuple[str, State]]:
    """A power cut, in every way; then a mount: memory is empty, what no entry names is free again."""
    for l1 in set(s.l1.possible):
        for a in set(s.tables[A].possible):
            for b in set(s.tables[B].possible):
                held = a | (b if B in l1 else NONE)
                data = tuple(Place(frozenset({c}) if c in held else NONE) for c in range(3))
                yield (
                    "power cut",
                    State(
                        data=data,
                        linked=held & FULL,
                        tables=(Place(a), Place(b if B in l1 else GARBAGE)),
                        l1=Place(l1),
                        waiters=tuple(  # type: ignore[arg-type]
                            w if w.where == "done" else Waiter() for w in s.waiters
                        ),
                        failures=s.failures,
                        crashes=s.crashes - 1,
                    ),
                )


def _with(items: Any, at: int, item: Any) -> Any:
    return (*items[:at], item, *items[at + 1 :])
