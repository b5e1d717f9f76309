"""Which class SAELens constructs: overrides and options in nested blocks, in threads, and through failures."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import permutations
from types import ModuleType
from typing import Any

import pytest
import sae_lens
from helpers import D, E, F, K, run_fields
from helpers.reloading import reloaded
from sae_lens import llm_sae_training_runner as llm_module
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKTrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_switch
from sae_lens_switch import LanguageModelSAERunnerConfig, SparseSAETrainer, SparseTopKTrainingSAE, override_topk
from sae_lens_switch.common.substitution import constructing
from sae_lens_switch.saes import registration
from sae_lens_switch.training import runners as runner_module
from sae_lens_switch.training.optim.constrained_adam import ConstrainedAdam
from sae_lens_switch.training.optim.row_sparse_adam import RowSparseAdam


@pytest.fixture
def stock():
    """The class in SAELens's table, which must be there again afterwards."""
    registered = SAE_TRAINING_CLASS_REGISTRY["topk"]
    assert registered[0] is TopKTrainingSAE
    yield registered
    assert SAE_TRAINING_CLASS_REGISTRY["topk"] is registered


def fail_if(what: bool) -> None:
    if what:
        raise RuntimeError


def is_overridden() -> bool:
    return SAE_TRAINING_CLASS_REGISTRY["topk"][0] is SparseTopKTrainingSAE


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_overrides_that_overlap_end_with_the_last(stock, order):  # noqa: ARG001
    overrides = [override_topk() for _ in order]
    for n_ended, i in enumerate(order):
        assert is_overridden(), n_ended
        overrides[i].restore()
        overrides[i].restore()  # a second call ends none of the others
    assert not is_overridden()


def test_an_override_can_be_entered_again_and_ends_with_an_exception(stock):  # noqa: ARG001
    override = override_topk()
    for _ in range(2):
        with pytest.raises(RuntimeError), override:
            fail_if(is_overridden())
        assert not is_overridden()


def test_a_class_from_before_a_reload_of_its_module_still_gives_back(stock):  # noqa: ARG001
    with reloaded(registration):
        assert registration.override_topk is not override_topk
        with override_topk():
            assert is_overridden()


def test_what_others_register_meanwhile_stays(stock):
    theirs = (type("Theirs", (TopKTrainingSAE,), {}), stock[1])
    with override_topk():
        SAE_TRAINING_CLASS_REGISTRY["topk"] = theirs
    assert SAE_TRAINING_CLASS_REGISTRY["topk"] is theirs
    SAE_TRAINING_CLASS_REGISTRY["topk"] = stock


def test_overrides_in_threads(stock):  # noqa: ARG001
    barrier = threading.Barrier(4)

    def work(_: int) -> list[bool]:
        found = []
        barrier.wait()
        for _ in range(300):
            with override_topk():
                found.append(is_overridden())
        return found

    with ThreadPoolExecutor(4) as pool:
        assert all(all(found) for found in pool.map(work, range(4)))
    assert not is_overridden()


def host() -> tuple[Any, Any]:
    module: Any = ModuleType("host")
    module.Trainer = lambda: "stock"
    return module, module.Trainer


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
def test_of_blocks_that_overlap_the_last_that_is_open_chooses(order):
    module, stock = host()
    blocks = [constructing(module, "Trainer", lambda i=i: i) for i in range(3)]
    for block in blocks:
        block.__enter__()
    still_open = [0, 1, 2]
    for i in order:
        assert module.Trainer() == still_open[-1]
        blocks[i].__exit__(None, None, None)
        still_open.remove(i)
    assert module.Trainer is stock


def test_a_block_that_fails_or_is_closed_by_another_thread_leaves_nothing_behind():
    module, stock = host()
    with pytest.raises(RuntimeError), constructing(module, "Trainer", lambda: "ours"):
        raise RuntimeError
    assert module.Trainer is stock

    block = constructing(module, "Trainer", lambda: "ours")
    block.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
    assert module.Trainer is stock
    with constructing(module, "Trainer", lambda: "later"):
        assert module.Trainer() == "later"
    assert module.Trainer is stock


def test_each_thread_constructs_what_it_has_chosen_and_others_what_saelens_would():
    module, stock = host()
    barrier = threading.Barrier(5)

    def work(name: str) -> set[str]:
        barrier.wait()
        found = set()
        for _ in range(300):
            with ExitStack() as stack:
                if name != "stock":
                    stack.enter_context(constructing(module, "Trainer", lambda: name))
                found.add(module.Trainer())
        return found

    names = ["a", "b", "c", "stock", "stock"]
    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(work, names)) == [{name} for name in names]
    assert module.Trainer is stock


def test_runs_in_two_threads_have_their_own_options_and_a_stock_run_between_them_its_own_trainer(
    tmp_path, model, dataset, monkeypatch
):
    """All three are in ``run`` at once: a trainer is made only when the others are about to make theirs."""
    barrier = threading.Barrier(3, timeout=120)
    made: dict[str, Any] = {}
    lock = threading.Lock()  # the language model is one

    def check_hook(*args: Any) -> None:
        with lock:
            check(*args)
        barrier.wait()

    check = runner_module.check_hook
    monkeypatch.setattr(runner_module, "check_hook", check_hook)

    def ours(name: str, optimizer: Any) -> None:
        class Runner(sae_lens_switch.LanguageModelSAETrainingRunner):
            def run_trainer_with_interruption_handling(self, trainer):
                made[name] = trainer
                barrier.wait()
                with lock:
                    return super().run_trainer_with_interruption_handling(trainer)

        cfg = LanguageModelSAERunnerConfig(
            architecture="switch", d_in=D, d_sae=F, n_experts=E, k=K, optimizer=optimizer, **run_fields(tmp_path / name)
        )
        Runner(cfg, override_model=model, override_dataset=dataset).run()

    class Stock(llm_module.LanguageModelSAETrainingRunner):
        def run_trainer_with_interruption_handling(self, trainer):
            made["stock"] = trainer
            barrier.wait()
            with lock:
                return trainer.fit()

    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(ours, name, name) for name in ("adam", "row_sparse_adam")]
        cfg = sae_lens.LanguageModelSAERunnerConfig(
            sae=sae_lens_switch.SwitchTrainingSAEConfig(d_in=D, d_sae=F, n_experts=E, k=K),
            **run_fields(tmp_path / "stock"),
        )
        runner = Stock(cfg, override_model=model, override_dataset=dataset)
        barrier.wait()
        runner.run()
        for run in runs:
            run.result()
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert llm_module.SAETrainer is SAETrainer
    assert type(made["stock"]) is SAETrainer
    assert type(made["adam"]) is type(made["row_sparse_adam"]) is SparseSAETrainer
    assert type(made["adam"].optimizer) is ConstrainedAdam
    assert type(made["row_sparse_adam"].optimizer) is RowSparseAdam
    for name in made:
        assert (tmp_path / name / "output" / "sae_weights.safetensors").exists()
