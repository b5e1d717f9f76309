"""Transcoders with their data, experts or latents divided over processes: as on one."""

from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import activations
from helpers.command_line import arguments
from helpers.parallel_runs import (
    BATCH,
    alone,
    assert_same_run,
    command_together,
    config,
    go_on_together,
    result,
    shared_bits,
    together,
)
from helpers.processes import on_processes
from helpers.transcoders import E, F, K, fresh_transcoder
from sae_lens import SAE, TrainingSAE

from sae_lens_switch import SwitchTrainingTranscoder, SwitchTranscoder
from sae_lens_switch.parallel import DataParallelSAETrainer, LatentParallelSAETrainer, ParallelSparseSAETrainer
from sae_lens_switch.parallel.__main__ import main
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.parallel.shard_classes import expert_shard_class

D, D_OUT = 12, 7
EXPERTS = "switch_transcoder"
AUX = {"aux_loss_coefficient": 0.3}


def rows() -> torch.Tensor:
    """Inputs, and targets far from them in mean and spread."""
    x = torch.cat(activations(5, batch=BATCH, d_in=D))
    W = torch.randn(D, D_OUT, generator=torch.Generator().manual_seed(3))
    return torch.cat([x, (x @ W).relu() * 0.2 + 4], dim=1)


def made(kind: str, **fields):
    return fresh_transcoder(kind, **{"d_out": D_OUT, "dtype": "float32", **fields})


def of_experts(n: int, folder: Path, steps: int, **fields) -> list[dict]:
    return together(n, folder, steps, source=rows(), **fields)


def of_latents(n: int, folder: Path, steps: int, **fields) -> list[dict]:
    kind = {"trainer_class": LatentParallelSAETrainer, "divided_by": "latent_parallel"}
    return together(n, folder, steps, source=rows(), **kind, **fields)


@pytest.mark.parametrize("optimizer", ["adam", "row_sparse_adam"])
@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (EXPERTS, {"skip_connection": True, **AUX}),
        (EXPERTS, {"tie_router_bias": True, "load_balance_coefficient": 1.0}),
        (EXPERTS, {"n_active_experts": 2, "skip_connection": True, **AUX}),
        (EXPERTS, {"load_balancing": "bias"}),
        (EXPERTS, {"router_z_loss_coefficient": 0.3, "load_balance_scale": "d_in"}),
        ("sparse_topk_transcoder", {"skip_connection": True, **AUX}),
        ("sparse_batchtopk_transcoder", {**AUX}),
    ],
    ids=str,
)
def test_two_processes_train_what_one_does(kind, fields, optimizer, tmp_path):
    make = partial(made, kind, **fields)
    expected = alone(12, make=make, source=rows(), optimizer=optimizer, max_grad_norm=0.2)
    over = of_experts if kind == EXPERTS else of_latents
    both = over(2, tmp_path, 12, make=make, optimizer=optimizer, max_grad_norm=0.2)
    for found in both:
        assert_same_run(found, expected)
    assert shared_bits(both[0]) == shared_bits(both[1])
    assert expected["weights"]["b_dec"].shape == (D_OUT,)


@pytest.mark.parametrize("n_active", [1, 2])
def test_rows_of_processes_divide_the_data(n_active, tmp_path):
    make = partial(made, EXPERTS, n_active_experts=n_active, skip_connection=True)
    expected = alone(12, make=make, source=rows())
    for found in of_experts(4, tmp_path, 12, make=make, expert_parallel=2):
        assert_same_run(found, expected)


def idle(n_active: int):
    """The last experts get no token, and of two processes the second none."""
    sae = made(EXPERTS, n_active_experts=n_active)
    with torch.no_grad():
        sae.W_router[:, 2:] = -10 * rows()[:, :D].mean(dim=0).unsqueeze(1)
    assert not sae.is_fresh
    return sae


@pytest.mark.parametrize("n_active", [1, 2])
def test_a_process_without_tokens_takes_part(n_active, tmp_path):
    make = partial(idle, n_active)
    expected = alone(12, make=make, source=rows())
    for found in of_experts(2, tmp_path, 12, make=make):
        assert_same_run(found, expected)
    assert (expected["density"].view(E, -1)[2:] == 0).all()


@pytest.mark.parametrize("kind", ["sparse_topk_transcoder"])
def test_data_alone_is_divided(kind, tmp_path):
    make = partial(made, kind, skip_connection=True, **AUX)
    expected = alone(12, make=make, source=rows())

    def run() -> dict:
        trainer = DataParallelSAETrainer(config(12), make(), rows())
        return result(trainer, trainer.fit())

    for found in on_processes(2, run, tmp_path):
        assert_same_run(found, expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "trainer_class", "field"),
    [
        (EXPERTS, ParallelSparseSAETrainer, "expert_parallel"),
        ("sparse_topk_transcoder", LatentParallelSAETrainer, "latent_parallel"),
    ],
)
def test_other_numbers_of_processes_resume_and_one_command_makes_it_ordinary(kind, trainer_class, field, tmp_path):
    make = partial(made, kind, skip_connection=True)
    expected = alone(12, make=make, source=rows())
    runs = tmp_path / "runs"
    for n, until in ((2, 4), (4, 8), (2, 12)):
        ends = {"n_checkpoints": 2, "save_final_checkpoint": True} if until == 12 else {}
        found = go_on_together(n, runs, (until, 12), make, trainer_class, source=rows(), **{field: n}, **ends)
    for one in found:
        assert_same_run(one, expected, rtol=2e-3, atol=2e-3)
    assert main([str(runs / f"final_{12 * BATCH}"), str(tmp_path / "used")]) == 0
    assert main([str(runs / f"final_{12 * BATCH}"), str(tmp_path / "trained"), "--for-training"]) == 0
    used, trained = SAE.load_from_disk(tmp_path / "used"), TrainingSAE.load_from_disk(tmp_path / "trained")
    for name, weight in found[0]["weights"].items():
        assert torch.equal(trained.get_parameter(name), weight), name
    x = rows()[:, :D]
    torch.testing.assert_close(used(x), trained(x), rtol=1e-4, atol=1e-4)


def test_a_new_one_is_initialised_as_on_one_process(tmp_path):
    def run() -> dict:
        cfg = made(EXPERTS, skip_connection=True).cfg
        return expert_shard_class(cfg).fresh(cfg, Ranks(2, "cpu", 60.0)).gathered().state_dict()

    (new, _), on_one = on_processes(2, run, tmp_path), made(EXPERTS, skip_connection=True).state_dict()
    assert {name: t.shape for name, t in new.items()} == {name: t.shape for name, t in on_one.items()}
    for name, t in new.items():
        torch.testing.assert_close(t.norm(), on_one[name].norm(), rtol=0.2, atol=0)
    torch.testing.assert_close(new["W_dec"].norm(dim=1), torch.ones(F))


@pytest.mark.parametrize("flag", ["--expert-parallel", "--latent-parallel", None])
def test_the_command_trains_one_on_two_hooks(flag, tmp_path, model, dataset):
    kind = "sparse_topk_transcoder" if flag == "--latent-parallel" else EXPERTS
    argv = ["--architecture", kind, "--d-in", "12", "--d-sae", str(F), "--k", str(K)]
    argv += ["--hook-name-out", "blocks.1.mlp.hook_post", "--d-out", "24"]
    argv += arguments(tmp_path, hook_name="blocks.1.ln2.hook_normalized")
    argv += ["--n-experts", str(E)] if kind == EXPERTS else []
    argv += [flag, "2"] if flag else []

    assert command_together(2, tmp_path, argv, model, dataset) == [0, 0]
    sae = SAE.load_from_disk(tmp_path / "output")
    assert sae.cfg.metadata.hook_name_out == "blocks.1.mlp.hook_post"
    assert sae.W_dec.shape == (F, 24)
    assert isinstance(sae, SwitchTranscoder) == (kind == EXPERTS)


def test_a_switch_transcoder_is_not_for_the_trainer_that_divides_data_alone(tmp_path):
    def run() -> str:
        with pytest.raises(ValueError, match="another architecture than switch") as error:
            DataParallelSAETrainer(config(5), SwitchTrainingTranscoder(made(EXPERTS).cfg), rows())
        return str(error.value)

    assert all("which ParallelSparseSAETrainer trains" in message for message in on_processes(2, run, tmp_path))
