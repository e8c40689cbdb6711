"""Whatever goes wrong in whatever step: the machine runs at one place at most, and a failed move leaves it where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
import trio
import trio.testing

from qedfs.errors import Interrupted, MigrationFailed, QedfsError
from qedfs.migrate.plan import Order, Phase, Side, Tell, plan, script, undoing
from qedfs.migrate.sequence import Summary, migrate
from tests.migrate.fake_qemu import RAW, FakeHost, Quiet, Suffers, Trouble, World, machines

ORDER = Order(
    leaf="/images/vm.qed",
    mountpoint="/mnt",
    raw=RAW,
    backing="nbd://source/disk",
    uri="tcp:here:4444",
    listen="tcp:0.0.0.0:4444",
    stop_export=True,
)


async def outcome(
    world: World, host: FakeHost, order: Order = ORDER, view: Quiet | None = None
) -> Summary | QedfsError:
    result: Summary | QedfsError
    async with trio.open_nursery() as nursery:
        try:
            result = await migrate(order, machines(world, nursery), host, view or Quiet())
        except QedfsError as error:
            result = error
        nursery.cancel_scope.cancel()
    return result


async def commands() -> dict[tuple[str, str], int]:
    """What a migration asks of whom, and how often, when nothing goes wrong."""
    world = World()
    assert isinstance(await outcome(world, FakeHost(world)), Summary)
    return world.seen


async def test_a_machine_is_moved_and_its_disk_follows() -> None:
    world, view = World(), Quiet()
    host = FakeHost(world)
    summary = await outcome(world, host, view=view)
    assert isinstance(summary, Summary)
    assert (world.source.state, world.destination.state) == ("postmigrate", "running")
    assert (host.leaf, host.mounted, host.held, host.mode, host.complete_at_last) == (True, True, False, "stream", True)
    assert not world.source.exports
    assert view.lines[0] == "Looking at the source"
    assert len(view.lines) == len(Phase)


async def test_a_paused_machine_stays_paused_and_is_told_so() -> None:
    world, view = World(paused=True), Quiet()
    assert isinstance(await outcome(world, FakeHost(world), replace(ORDER, stop_export=False), view), Summary)
    assert (world.source.state, world.destination.state) == ("postmigrate", "paused")
    assert world.source.exports
    assert any("paused" in line for line in view.lines)


async def test_a_failed_move_of_a_paused_machine_does_not_start_it() -> None:
    world = World(Trouble("host", "hold", Suffers.REFUSAL), paused=True)
    assert isinstance(await outcome(world, FakeHost(world)), MigrationFailed)
    assert not world.source.ever_ran
    assert not world.destination.ever_ran


@pytest.mark.parametrize("keep", [False, True], ids=["", "keep"])
async def test_every_trouble_at_every_step(autojump_clock: trio.testing.MockClock, keep: bool) -> None:
    order = replace(ORDER, keep=keep)
    met = 0
    for (where, command), turns in (await commands()).items():
        for what in Suffers if where != "host" else (Suffers.REFUSAL, Suffers.SIGNAL):
            for turn in range(1, turns + 1):
                world = World(Trouble(where, command, what, turn))
                host = FakeHost(world)
                judge(world, host, await outcome(world, host, order), keep)
                assert world.hits == 1
                met += 1
    assert met > 100


@pytest.mark.parametrize("what", [Suffers.LOST_BEFORE, Suffers.LOST_AFTER, Suffers.SILENCE])
@pytest.mark.parametrize(
    "another",
    [
        ("source", "migrate_cancel"),
        ("source", "query-status", 2),
        ("source", "migrate-set-capabilities", 2),
        ("destination", "quit"),
    ],
    ids=lambda words: words[1],
)
async def test_the_way_back_goes_on_over_a_lost_connection(
    autojump_clock: trio.testing.MockClock, another: tuple[str, str] | tuple[str, str, int], what: Suffers
) -> None:
    where, command, *turn = another
    world = World(Trouble("host", "hold", Suffers.REFUSAL), Trouble(where, command, what, *turn))
    host = FakeHost(world)
    judge(world, host, await outcome(world, host), keep=False)
    assert world.hits == 2


async def test_a_source_that_has_completed_is_started_again_when_the_destination_is_lost(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World(Trouble("destination", "query-migrate", Suffers.DEATH))
    host = FakeHost(world)
    told = str(await outcome(world, host))
    assert "switching over: destination" in told
    assert "the source goes on" in told
    assert (world.source.migration, world.source.state, host.leaf) == ("completed", "running", False)


def judge(world: World, host: FakeHost, result: Summary | QedfsError, keep: bool) -> None:
    trouble = world.trouble
    assert trouble is not None
    about = f"{trouble} -> {result}"
    source, destination = world.source, world.destination
    if isinstance(result, Summary):
        # Not everything matters: an answer to a look may be lost where another look follows.
        assert destination.state == "running", about
        assert source.state == "postmigrate", about
        return
    told = str(result)
    unclear = (trouble.where, trouble.command) == ("destination", "cont") and trouble.what is not Suffers.REFUSAL
    if destination.ever_ran or unclear:
        assert source.state in ("postmigrate", "gone"), about
        assert host.leaf, about
        assert "the machine runs here" in told or "may run or not" in told, about
        return
    if source.state == "gone":
        assert not destination.ever_ran, about
        assert source.side.value in told, about
    else:
        assert source.state == "running", about
        assert source.migration in ("", "failed", "cancelled", "completed"), about
        unknown = trouble.command == "migrate-set-capabilities" and trouble.what in (Suffers.REFUSAL,)
        assert unknown or not source.capabilities["pause-before-switchover"], about
        assert source.capabilities["xbzrle"], about
    assert destination.state != "running", about
    assert not host.mounted, about
    # INVARIANT: a leaf that was released, perhaps, is not there any more.
    assert host.leaf == (keep and host.held), about
    assert ("the leaf is kept" in told) == host.leaf, about


async def test_a_signal_before_anything_was_done_says_so() -> None:
    world = World(Trouble("source", "query-status", Suffers.SIGNAL))
    result = await outcome(world, FakeHost(world))
    assert isinstance(result, Interrupted)
    assert str(result) == "migrate: interrupted while looking at the source; nothing was changed"


async def test_a_switch_over_that_takes_too_long_is_undone(autojump_clock: trio.testing.MockClock) -> None:
    world = World()

    class Slow(FakeHost):
        async def set(self, raw: str, name: str, value: str) -> None:
            await super().set(raw, name, value)
            await trio.sleep(31)

    host = Slow(world)
    result = await outcome(world, host)
    assert "releasing the hold: switch-over: not done within 30 s" in str(result)
    assert (world.source.state, host.leaf) == ("running", False)


async def test_what_cannot_be_undone_is_told_and_the_rest_is(autojump_clock: trio.testing.MockClock) -> None:
    world = World(Trouble("source", "migrate-continue", Suffers.DEATH))
    host = FakeHost(world)
    told = str(await outcome(world, host))
    assert "NOT DONE: the source goes on (source: cannot be reached)" in told
    assert "the leaf is removed" in told
    assert world.destination.state == "gone"


@pytest.mark.parametrize(
    ("state", "why"),
    [("running", "is not waiting for a machine, it is running"), ("paused", "start it with -incoming defer")],
)
async def test_a_destination_that_is_something_else_is_left_alone(state: str, why: str) -> None:
    world = World()
    world.destination.state = state
    host = FakeHost(world)
    assert why in str(await outcome(world, host))
    assert world.destination.state == state
    assert not host.leaf


async def test_a_destination_without_the_disk_is_left_alone() -> None:
    world = World()
    host = FakeHost(world)
    order = replace(ORDER, raw="/mnt/another.raw")
    assert "destination: has no disk /mnt/another.raw" in str(await outcome(world, host, order))
    assert world.destination.state == "inmigrate"


async def test_a_source_that_is_being_migrated_is_left_alone() -> None:
    world = World()
    world.source.migration = "active"
    assert "a migration is under way (active)" in str(await outcome(world, FakeHost(world)))
    assert world.source.migration == "active"


def test_nothing_is_undone_once_the_destination_may_run() -> None:
    assert all(undoing(phase, ORDER) is None for phase in Phase if phase >= Phase.START)
    assert undoing(Phase.LOOK, ORDER) == undoing(Phase.LEAF, ORDER) == []


def test_the_destination_is_kept_from_running_by_itself_before_anything_can_arrive() -> None:
    told = [a for actions in plan(ORDER).values() for a in actions if isinstance(a, Tell)]
    assert [a.command for a in told if a.side is Side.DESTINATION] == ["stop", "migrate-incoming"]


def test_the_script_shows_no_secret() -> None:
    order = replace(ORDER, backing="nbd://source/disk?token=hush", leaf="/images/a vm.qed")
    lines = script(order, {side: side.value for side in Side})
    assert "hush" not in "\n".join(lines)
    assert "qedfs create --hold -b 'nbd://source/disk?***' -F raw '/images/a vm.qed'" in lines
