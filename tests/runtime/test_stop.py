"""A signal to any process or the time limit ends a run early, but never before one step."""

import os
import signal

import pytest
import torch
from conftest import in_processes

from pretrain.runtime import stop as module
from pretrain.runtime.distributed import start, stop
from pretrain.runtime.stop import StopFlag
from pretrain.signals import STOP_SIGNALS, handled


@pytest.fixture(autouse=True)
def without_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    flag = StopFlag()
    with handled(flag.note):
        os.kill(os.getpid(), signal.SIGHUP)
        assert not flag.agreed()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_handlers_are_restored(number, capfd):
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    flag = StopFlag()
    with handled(flag.note):
        assert not flag.agreed() and flag.signaled() == 0 and flag.reason == ""
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)  # the first one counts
        assert flag.signaled() == number and flag.agreed()
    assert flag.signal == number and flag.reason == number.name
    assert number.name in capfd.readouterr().err
    assert before == {number: signal.getsignal(number) for number in STOP_SIGNALS}


def test_the_time_limit_counts_from_the_second_call(monkeypatch):
    """After one step, so that a run that is restarted again and again makes progress."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    flag = StopFlag(max_minutes=2, limit="limit")
    clock[0] = 219.0
    assert not flag.agreed() and not flag.agreed()
    clock[0] = 220.0
    assert flag.signaled() == 0, "it does not cut an evaluation short"
    assert flag.agreed() and flag.reason == "limit" and flag.signal == 0
    assert not StopFlag().agreed() and not StopFlag(0).agreed()


def test_a_signal_during_the_exchange_stops_all_at_the_next_call(tmp_path):
    """So does the time limit of one process."""

    def main(argv):
        world, _ = start("cpu")
        limit = StopFlag(max_minutes=60)
        limit._begin -= 3600 * world.rank
        found = [limit.agreed(), limit.agreed()]
        for name in ("max_over_ranks", "any_rank"):
            exchange = getattr(module, name)

            def interrupted(value, exchange=exchange):
                result = exchange(value)
                if world.rank == 1:
                    os.kill(os.getpid(), signal.SIGTERM)
                return result

            flag = StopFlag(max_minutes=60)
            with handled(flag.note), pytest.MonkeyPatch.context() as patch:
                flag.agreed()
                patch.setattr(module, name, interrupted)
                found += [flag.agreed(), flag.agreed()]
        torch.save(found, tmp_path / str(world.rank))
        stop()

    ended = in_processes(tmp_path, main, [], count=2)
    assert [code for code, _ in ended] == [0, 0], ended
    for rank in "01":
        assert torch.load(tmp_path / rank) == [False, True] * 3
