"""A process that all others wait for is named, with what it takes; none is where all are alike."""

import logging

import pytest
from helpers.parallel_runs import config, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae

from sae_lens_switch.common.printable import logger
from sae_lens_switch.parallel import ParallelSparseSAETrainer, pace
from sae_lens_switch.parallel.pace import Pace


class OfThree:
    """Ranks without processes, whose clock is the test's."""

    def __init__(self, is_first: bool = True) -> None:
        self.size, self.is_first, self.seconds_waited = 3, is_first, 0.0


@pytest.fixture
def warnings(caplog):
    with caplog.at_level(logging.WARNING, logger=logger.name):
        yield caplog


def paced(seconds: list[float], monkeypatch, n_steps: int = 4, **fields) -> Pace:
    monkeypatch.setattr(pace, "_STEPS", 4)
    found = Pace(OfThree(**fields))  # type: ignore[arg-type]
    for _ in range(n_steps + 1):
        found.next_step(seconds)
    return found


def test_the_slowest_is_named_with_its_seconds_and_the_others(warnings, monkeypatch):
    paced([0.02, 0.02, 0.05], monkeypatch)
    assert "rank 2 works 0.05 s per step, the others 0.02 s (median): all wait for it" in warnings.text


@pytest.mark.parametrize("seconds", [[0.02, 0.02, 0.029], [0.001, 0.001, 0.005], [0.02] * 3], ids=str)
def test_a_little_slower_is_not_worth_a_word(seconds, warnings, monkeypatch):
    paced(seconds, monkeypatch)
    assert warnings.text == ""


def test_it_is_said_once_in_so_many_steps_and_by_the_first_process(warnings, monkeypatch):
    paced([0.02, 0.02, 0.05], monkeypatch, n_steps=3)
    paced([0.02, 0.02, 0.05], monkeypatch, is_first=False)
    assert warnings.text == ""
    paced([0.02, 0.02, 0.05], monkeypatch, n_steps=9)
    assert len(warnings.records) == 2


def test_waiting_for_others_is_no_work(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    ranks = OfThree()
    found = Pace(ranks)  # type: ignore[arg-type]
    assert found.worked() == 0
    ranks.seconds_waited = 7.0
    found.next_step([0.0] * 3)
    now[0] += 5
    ranks.seconds_waited += 2
    assert found.worked() == 3
    found.next_step([3.0] * 3)
    assert found.worked() == 0


def test_a_slow_process_of_a_run_is_named_with_what_it_has_told(tmp_path, monkeypatch):
    monkeypatch.setattr(pace, "_STEPS", 5)
    monkeypatch.setattr(Pace, "worked", lambda self: 2.0 + 3 * self.ranks.rank)

    def run() -> list[str]:
        trainer = ParallelSparseSAETrainer(config(12, expert_parallel=2), make_sae(), tokens())
        said: list[str] = []
        monkeypatch.setattr(pace.logger, "warning", said.append)
        trainer.fit()
        assert trainer.ranks.seconds_waited > 0
        return said

    first, second = on_processes(2, run, tmp_path)
    assert first == ["rank 1 works 5 s per step, the others 2 s (median): all wait for it"] * 2
    assert second == []
