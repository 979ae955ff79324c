from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from qtool.sandbox import (
    CallRaised,
    ChildDied,
    LimitExceeded,
    Sandbox,
    TooManyWaiting,
)
from qtool.sandbox.blocking import BlockingSandbox
from qtool.sandbox.forked import ForkedSandbox

HERE = Path(__file__).stem
MB = 1 << 20
KEPT = []

# What the children run.


def echo(value):
    return value


def do(what, value=None):
    """One function that does what a test asks for, so that each test has a single child."""
    return DEEDS[what](value)


def keep(megabytes):
    KEPT.append(b"x" * (megabytes * MB))


def fail_to_start():
    raise ValueError("no\nluck")


def spin(_):
    while True:
        pass


def shout(_):
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    os.write(1, b"raw\n")
    return sys.stdin.read()


def rave(text):
    """Write into every descriptor, as code that broke out of a function might."""
    for descriptor in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(descriptor, text.encode())
    time.sleep(5)


def complain(message):
    raise KeyError(message)


def leave(_):
    raise SystemExit(3)


DEEDS = {
    "echo": echo,
    "pid": lambda _: os.getpid(),
    "sleep": lambda seconds: time.sleep(seconds),
    "spin": spin,
    "eat": lambda megabytes: len(b"x" * (megabytes * MB)),
    # one instruction of the interpreter: nothing inside could stop it
    "compute": lambda _: 3 ** (3**30),
    "text": lambda length: "x" * length,
    "shout": shout,
    "rave": rave,
    "complain": complain,
    "leave": leave,
    "exit": lambda code: os._exit(code),
    "kill": lambda number: os.kill(os.getpid(), number),
    "environment": lambda _: dict(os.environ),
    "object": lambda _: object(),
    "bad_alloc": lambda _: (_ for _ in ()).throw(RuntimeError("std::bad_alloc")),
}


@pytest.fixture(autouse=True)
def children(monkeypatch):
    """A function that returns the processes that the test has started; none is left at its end."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    before = set(psutil.Process().children(recursive=True))
    yield lambda: set(psutil.Process().children(recursive=True)) - before
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.fixture
def run():
    """Run a coroutine in a loop of the server's kind."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        yield runner.run


@pytest.fixture
def make(run):
    """Make a sandbox that is closed when the test ends."""
    made = []

    def make_one(function="do", *, timeout_s=20, memory_bytes=200 * MB, **options):
        async def build():
            return Sandbox(
                f"{HERE}:{function}", timeout_s=timeout_s, memory_bytes=memory_bytes, **options
            )

        made.append(run(build()))
        return made[-1]

    yield make_one
    for sandbox in made:
        run(sandbox.close())


def gather(*calls):
    async def all_of_them():
        return await asyncio.gather(*calls, return_exceptions=True)

    return all_of_them()


def test_any_json_comes_back_as_it_was(run, make):
    sandbox = make("echo")
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False)
        | st.text(st.characters()),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters()), inner),
    )

    @given(values)
    def comes_back(value):
        assert run(sandbox.call(value)) == value

    comes_back()


def test_many_calls_are_answered_each_with_its_own_answer(run, make):
    sandbox = make()
    assert run(gather(*(sandbox.call("echo", number) for number in range(100)))) == list(range(100))


def test_a_slow_call_is_stopped_and_those_behind_it_are_served_by_a_new_child(run, make):
    sandbox = make(timeout_s=1)
    first = run(sandbox.call("pid"))
    slow, *others = run(gather(sandbox.call("spin"), sandbox.call("echo", 1), sandbox.call("pid")))
    assert isinstance(slow, LimitExceeded) and slow.limit == "time"
    assert others[0] == 1 and others[1] != first
    assert not psutil.pid_exists(first)


def test_a_call_that_never_leaves_one_instruction_is_stopped(run, make):
    sandbox = make(timeout_s=1)
    with pytest.raises(LimitExceeded, match="more than 1 s"):
        run(sandbox.call("compute"))


def test_waiting_does_not_count(run, make):
    sandbox = make(timeout_s=2)
    assert run(gather(*(sandbox.call("sleep", 0.8) for _ in range(4)))) == [None] * 4


def test_imports_and_init_do_not_count(run, make):
    sandbox = make(init=[f"{HERE}:keep", 300], timeout_s=1, memory_bytes=60 * MB)
    assert run(sandbox.call("eat", 20)) == 20 * MB
    with pytest.raises(LimitExceeded):
        run(sandbox.call("eat", 100))


def test_too_much_memory_is_refused_and_the_child_replaced(run, make):
    sandbox = make(memory_bytes=100 * MB)
    first = run(sandbox.call("pid"))
    for deed, value in (("eat", 200), ("bad_alloc", None)):
        with pytest.raises(LimitExceeded) as caught:
            run(sandbox.call(deed, value))
        assert caught.value.limit == "memory"
    assert run(sandbox.call("pid")) != first


def test_too_long_a_result_is_refused(run, make):
    sandbox = make(output_bytes=MB)
    assert len(run(sandbox.call("text", MB - 20))) == MB - 20
    with pytest.raises(LimitExceeded) as caught:
        run(sandbox.call("text", MB))
    assert caught.value.limit == "output"
    assert run(sandbox.call("echo", 1)) == 1


def test_an_exception_comes_back_as_name_and_one_line_and_the_child_stays(run, make):
    sandbox = make()
    first = run(sandbox.call("pid"))
    with pytest.raises(CallRaised) as caught:
        run(sandbox.call("complain", "a\nb" + "c" * 10_000))
    assert caught.value.name == "KeyError"
    assert caught.value.message.startswith(r"'a\nbccc") and len(caught.value.message) <= 300
    for deed, name in (("leave", "SystemExit"), ("object", "TypeError")):
        with pytest.raises(CallRaised, match=name):
            run(sandbox.call(deed))
    assert run(sandbox.call("pid")) == first


def test_arguments_nested_too_deeply_are_refused(run, make):
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(CallRaised, match="too deeply"):
        run(make("echo").call(deep))


@pytest.mark.parametrize(
    ("deed", "value", "how"),
    [("exit", 3, "exit code 3"), ("kill", 6, "SIGABRT"), ("kill", 9, "memory")],
)
def test_a_child_that_dies_is_replaced(run, make, deed, value, how):
    sandbox = make()
    with pytest.raises(ChildDied, match=how):
        run(sandbox.call(deed, value))
    assert run(sandbox.call("echo", 1)) == 1


def test_a_child_that_dies_between_calls_is_not_noticed(run, make):
    sandbox = make()
    first = psutil.Process(run(sandbox.call("pid")))
    first.kill()
    while first.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert run(sandbox.call("pid")) != first.pid


def test_what_libraries_print_does_not_matter(run, make):
    sandbox = make()
    assert run(sandbox.call("shout")) == ""
    assert run(sandbox.call("echo", 1)) == 1


def test_a_child_that_sends_nonsense_is_replaced(run, make):
    sandbox = make(output_bytes=50_000)
    for nonsense in ("what?\n", "{}\n", '{"raised": 1}\n', "[" * 40_000 + "\n"):
        with pytest.raises(ChildDied, match="invalid answer"):
            run(sandbox.call("rave", nonsense))
    with pytest.raises(LimitExceeded, match="too long"):
        run(sandbox.call("rave", "x" * 60_000))
    assert run(sandbox.call("echo", 1)) == 1


def test_the_child_knows_no_secrets(run, make, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    environment = run(make().call("environment"))
    assert "hf_secret" not in environment.values()
    assert environment["TZ"] == "Asia/Tokyo"


def test_a_caller_who_leaves_disturbs_no_other(run, make):
    sandbox = make(timeout_s=20)

    async def scenario():
        first = await sandbox.call("pid")
        running, waiting = (
            asyncio.create_task(sandbox.call("sleep", 1)),
            asyncio.create_task(sandbox.call("exit", 1)),
        )
        behind = asyncio.create_task(sandbox.call("echo", "mine"))
        await asyncio.sleep(0.2)
        running.cancel()
        waiting.cancel()
        assert await behind == "mine"
        assert await sandbox.call("pid") == first  # the one that waited never ran
        assert running.cancelled() and waiting.cancelled()

    run(scenario())


def test_only_so_many_wait_and_who_leaves_makes_room(run, make):
    sandbox = make(max_waiting=2)

    async def scenario():
        calls = [asyncio.create_task(sandbox.call("sleep", 0.5))]
        await asyncio.sleep(0.1)
        calls += [asyncio.create_task(sandbox.call("echo", number)) for number in range(2)]
        await asyncio.sleep(0.1)
        with pytest.raises(TooManyWaiting):
            await sandbox.call("echo", 2)
        calls[1].cancel()
        await asyncio.sleep(0)
        assert await sandbox.call("echo", 3) == 3
        assert await calls[2] == 1

    run(scenario())


def test_close_ends_what_runs_and_what_waits(run, make, children):
    sandbox = make()

    async def scenario():
        calls = [asyncio.create_task(sandbox.call(*deed)) for deed in (("spin",), ("echo", 1))]
        await asyncio.sleep(0.5)
        await sandbox.close()
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(error) for error in run(scenario())] == [ChildDied, ChildDied]
    assert not children()
    with pytest.raises(ChildDied, match="closed"):
        run(sandbox.call("echo", 1))


@pytest.mark.parametrize("delay_s", [0, 0.01, 0.05, 0.1, 0.3])
def test_close_ends_a_child_that_is_being_started(run, make, children, delay_s):
    sandbox = make()

    async def scenario():
        call = asyncio.create_task(sandbox.call("echo", 1))
        await asyncio.sleep(delay_s)
        await sandbox.close()
        await asyncio.wait([call])
        return call.exception()

    assert isinstance(run(scenario()), ChildDied | None)
    assert not children()


def test_a_child_that_does_not_start_is_told_to_every_caller(run, make):
    sandbox = make(init=[f"{HERE}:fail_to_start"])
    for _ in range(2):
        with pytest.raises(ChildDied, match="ValueError: no luck"):
            run(sandbox.call("echo", 1))
    with pytest.raises(ChildDied, match="AttributeError"):
        run(make("no_such_function").call(1))
    with pytest.raises(ChildDied, match=r"more than 0\.01 s"):
        run(make(start_timeout_s=0.01).call(1))


def test_signals_for_the_whole_server_do_not_end_the_child(run, make):
    sandbox = make()
    first = run(sandbox.call("pid"))
    assert os.getsid(first) == first  # what a terminal sends does not even reach it
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(first, number)
    assert run(sandbox.call("pid")) == first


# Without an event loop


def test_an_interrupted_call_ends_at_once_with_its_child(children):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    start = time.monotonic()
    sandbox = Sandbox(f"{HERE}:do", timeout_s=100, memory_bytes=200 * MB)
    try:
        with pytest.raises(KeyboardInterrupt), BlockingSandbox(sandbox) as blocking:
            assert blocking.call("echo", 1, timeout_s=50) == 1
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            blocking.call("spin", timeout_s=50)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - start < 20
    assert not children()


def test_a_forked_sandbox_has_the_same_limits(children, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    def fork():
        return ForkedSandbox(do, memory_bytes=100 * MB, output_bytes=MB)

    limits = {"time": ("spin", None), "memory": ("eat", 200), "output": ("text", 2 * MB)}
    for limit, deed in limits.items():
        with pytest.raises(LimitExceeded) as caught, fork() as sandbox:
            sandbox.call(*deed, timeout_s=1)
        assert caught.value.limit == limit
    for deed, how in ((("exit", 3), "exit code 3"), (("kill", 9), "memory")):
        with pytest.raises(ChildDied, match=how), fork() as sandbox:
            sandbox.call(*deed, timeout_s=20)
    with fork() as sandbox:
        assert sandbox.call("echo", "\ud800", timeout_s=20) == "\ud800"
        with pytest.raises(CallRaised, match="KeyError"):
            sandbox.call("complain", "a", timeout_s=20)
        assert sandbox.call("pid", timeout_s=20) != os.getpid()
        assert "hf_secret" not in sandbox.call("environment", timeout_s=20).values()
    assert not children()


PARENT = """
import asyncio
from qtool.sandbox import Sandbox

async def main():
    sandboxes = [
        Sandbox("test_sandbox:do", timeout_s=100, memory_bytes=100 << 20) for _ in range(2)
    ]
    print(*[await sandbox.call("pid") for sandbox in sandboxes], flush=True)
    await sandboxes[0].call("spin")

asyncio.run(main())
"""


def test_children_end_with_the_parent_idle_or_busy():
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True
    ) as parent:
        children = [psutil.Process(int(pid)) for pid in parent.stdout.readline().split()]
        assert len(children) == 2
        time.sleep(0.2)
        parent.kill()
    _, left = psutil.wait_procs(children, timeout=5)
    assert not left
