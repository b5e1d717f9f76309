"""A signal in the last step of a run on several processes: all of them save what they have trained."""

import pytest
from helpers.parallel_runs import BATCH, config, signal_in_step, tokens
from helpers.processes import on_processes
from helpers.resumed import make_sae

from sae_lens_switch.parallel import ParallelSparseSAETrainer
from sae_lens_switch.training.interruption import SignalledError

STEPS = 5


def test_a_signal_to_one_process_in_the_last_step_saves_on_all(tmp_path):
    saved = tmp_path / "checkpoints"

    def run() -> tuple[str, int]:
        cfg = config(STEPS, expert_parallel=2, checkpoint_path=str(saved))
        trainer = ParallelSparseSAETrainer(cfg, make_sae(), tokens())
        signal_in_step(trainer, STEPS - 1)
        with pytest.raises(SignalledError) as error:
            trainer.fit()
        return str(error.value), trainer.n_training_steps

    assert on_processes(2, run, tmp_path) == [("training was interrupted by SIGTERM", STEPS)] * 2
    assert [folder.name for folder in saved.iterdir()] == [str(STEPS * BATCH)]
