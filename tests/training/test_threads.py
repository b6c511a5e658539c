"""How many threads a run takes: what is quickest on the steps themselves, found again when other jobs come and go."""

from types import SimpleNamespace

import pytest
import torch

from ldm.training.callback import threads
from ldm.training.callback.threads import Threads, quickest


@pytest.fixture
def machine(monkeypatch):
    """A clock, and the number of threads that was set last; no thread is touched."""
    state = SimpleNamespace(now=0.0, threads=None)
    monkeypatch.setattr(threads.time, "perf_counter", lambda: state.now)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: setattr(state, "threads", count))
    return state


def steps(callback, machine, count, seconds):
    """Runs `count` steps of seconds(threads) each; -> the number of threads of each."""
    met = []
    for _ in range(count):
        callback.on_train_batch_start(None, None)
        machine.now += seconds(machine.threads)
        met.append(machine.threads)
        callback.on_train_batch_end(None, None)
    return met


def start(device="cpu", **settings):
    callback = Threads(**settings)
    callback.on_train_start(None, SimpleNamespace(device=torch.device(device)))
    return callback


@pytest.mark.parametrize("most, best", [(2, 2), (4, 4), (8, 4), (6, 4)])
def test_it_takes_twice_as_many_as_long_as_that_is_quicker(machine, most, best):
    callback = start(most=most, every=10)
    met = steps(callback, machine, 60, lambda count: 1 / count if count <= 4 else 1.0)
    assert met[:4] == [1] * 4 and met[4:8] == [2] * 4, "begins with one"
    assert callback.best == best and max(met) <= most


def test_it_goes_back_to_one_when_another_job_comes_and_on_when_it_goes(machine):
    callback = start(most=2, every=5)
    quiet, busy = (lambda count: 1 / count), (lambda count: float(count))
    assert steps(callback, machine, 13, quiet)[-5:] == [2] * 5
    assert steps(callback, machine, 13, busy)[-5:] == [1] * 5
    assert steps(callback, machine, 13, quiet)[-5:] == [2] * 5


def test_a_number_that_takes_far_longer_is_tried_for_one_step(machine):
    met = steps(start(most=2, every=5), machine, 16, lambda count: 10.0**count)
    assert met == [1, 1, 1, 1, 2, *[1] * 5, 1, 1, 1, 1, 2, 1]


def test_one_slow_step_decides_nothing():
    assert quickest({1: [9.0, 1.0, 1.0, 1.0], 2: [9.0, 0.7, 50.0, 0.7]}) == 2
    assert quickest({1: [0.1, 1.0, 1.0, 1.0], 2: [0.1, 1.2, 1.2, 1.2]}) == 1


def test_it_leaves_a_gpu_and_a_single_core_alone(machine):
    for callback in (start("cuda", most=4), start(most=1)):
        assert steps(callback, machine, 5, lambda count: 1.0) == [None] * 5


def test_it_takes_no_more_cores_than_it_may_use(monkeypatch):
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert Threads().most == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert Threads().most == 2
