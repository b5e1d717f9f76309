"""Steps that go through a graph's memory, without a GPU: the same training, and what cannot be captured is refused."""

import pytest
import torch
from helpers import D, E, F, K, activations, training_sae
from sae_lens import LoggingConfig
from sae_lens.registry import get_sae_training_class

from sae_lens_switch import SparseSAETrainer, SparseSAETrainerConfig
from sae_lens_switch.training.step_graph import StepGraph


def make_sae(architecture: str, **fields):
    if architecture == "switch":
        return training_sae(dtype="float32", load_balance_warm_up_steps=5, **fields)
    torch.manual_seed(0)
    fields = {"d_in": D, "d_sae": F, "k": K, "aux_loss_coefficient": 0.0, **fields}
    if "matryoshka" in architecture:
        fields["matryoshka_widths"] = [F // 3, F]
    if "transcoder" in architecture:
        fields["d_out"] = D
    if "switch" in architecture:
        fields["n_experts"] = E
    sae_class, config_class = get_sae_training_class(architecture)
    return sae_class(config_class(**fields))


def make_trainer(sae, **fields) -> SparseSAETrainer:
    batches = [*activations(15), activations(1, batch=40)[0], *activations(9, seed=5)]
    if sae.batch_width > D:  # a transcoder: other tokens are its targets
        batches = [torch.cat([x, x.roll(1, 0)], dim=1) for x in batches]
    cfg = {"lr": 1e-2, "lr_warm_up_steps": 3, "feature_sampling_window": 7, **fields}
    return SparseSAETrainer(SparseSAETrainerConfig(sum(map(len, batches)), 64, **cfg), sae, iter(batches))


@pytest.fixture(autouse=True)
def no_history(monkeypatch):
    """Runs this short log every step, and a step that is logged is not replayed."""
    monkeypatch.setattr("sae_lens_switch.training.history.History.is_due", lambda *_: False)


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize(
    "architecture",
    ["switch", "sparse_topk", "sparse_abstopk", "sparse_batchtopk", "sparse_matryoshka_batchtopk", "switch_transcoder",
     "sparse_topk_transcoder"],
)  # fmt: skip
def test_a_run_through_the_memory_of_a_graph_is_the_same_run(architecture, parts):
    options = {"gradient_accumulation_steps": parts, "logger": LoggingConfig(log_to_wandb=False)}
    plain = make_trainer(make_sae(architecture), **options)
    graphed = make_trainer(make_sae(architecture), cuda_graph=True, **options)
    plain.fit()
    graphed.fit()
    assert graphed._graph.n_calls > 15
    for (name, p), q in zip(graphed.sae.named_parameters(), plain.sae.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)  # the rate is rounded to float32
    assert torch.equal(graphed.act_freq_scores, plain.act_freq_scores)
    assert torch.equal(graphed.n_forward_passes_since_fired, plain.n_forward_passes_since_fired)
    assert graphed.n_training_samples == plain.n_training_samples
    if architecture == "switch":
        torch.testing.assert_close(graphed.routing.load_E, plain.routing.load_E)


AUX = {
    "switch": {"n_experts": 4, "d_sae": 48, "k": 3},
    "switch, two of four experts": {"n_experts": 4, "d_sae": 48, "k": 3, "n_active_experts": 2},
    "switch, shared latents": {"n_experts": 4, "d_sae": 56, "k": 4, "n_shared_experts": 1, "shared_width": 8},
    "switch_transcoder": {},
    "sparse_topk": {"apply_b_dec_to_input": False},
    "sparse_abstopk": {},
    "sparse_batchtopk": {"rescale_acts_by_decoder_norm": False},
    "sparse_matryoshka_batchtopk": {},
    "sparse_topk_transcoder": {},
}


@pytest.mark.parametrize("name", AUX)
def test_dead_latents_learn_the_same_without_being_counted(name):
    options = {"logger": LoggingConfig(log_to_wandb=False), "dead_feature_window": 2}

    def make():
        return make_sae(name.split(",")[0], aux_loss_coefficient=0.5, **AUX[name])

    plain, graphed = make_trainer(make(), **options), make_trainer(make(), cuda_graph=True, **options)
    n_dead, losses = [], []
    step = graphed._graph.step

    def watched(x):
        output = step(x)
        n_dead.append(int(graphed.dead_neurons.sum()))
        losses.append(float(output.losses["auxiliary_reconstruction_loss"]))
        return output

    graphed._graph.step = watched
    plain.fit()
    graphed.fit()
    assert losses[0] == 0  # none is dead yet
    assert max(losses) > 0
    assert len(set(n_dead)) > 3
    for (key, p), q in zip(graphed.sae.named_parameters(), plain.sae.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
    assert torch.equal(graphed.n_forward_passes_since_fired, plain.n_forward_passes_since_fired)


def test_what_a_step_reads_from_the_host_changes_with_the_schedules():
    the_trainer = make_trainer(make_sae("switch"), cuda_graph=True, logger=LoggingConfig(log_to_wandb=False))
    seen = []
    step = the_trainer._graph.step

    def recorded(x):
        seen.append({name: round(float(t), 9) for name, t in the_trainer._scalars.items()})
        return step(x)

    the_trainer._graph.step = recorded
    the_trainer.fit()
    assert len({s["lr"] for s in seen}) > 5
    assert len({s["load_balance"] for s in seen}) >= 4


def test_a_resumed_run_captures_anew(tmp_path):
    options = {"cuda_graph": True, "logger": LoggingConfig(log_to_wandb=False)}
    first = make_trainer(make_sae("switch"), checkpoint_path=str(tmp_path), n_checkpoints=1, **options)
    first.fit()
    (checkpoint,) = tmp_path.iterdir()
    again = make_trainer(make_sae("switch"), resume=str(checkpoint), **options)
    again.fit()
    for p, q in zip(again.sae.parameters(), first.sae.parameters(), strict=True):
        assert torch.equal(p, q)
    assert again._graph.n_calls > 0
    again.load_trainer_state(checkpoint)  # which replaces tensors that a captured step would go on writing to
    assert again._graph.n_calls == 0
    assert again._graph.x_BD is None


@pytest.mark.parametrize(
    ("architecture", "sae", "run", "without"),
    [
        (
            "switch",
            {"aux_loss_coefficient": 0.1, "aux_k": F // E + 1},
            {},
            "aux_loss_coefficient=0, or an aux_k up to .*",
        ),
        (
            "sparse_matryoshka_batchtopk",
            {"aux_loss_coefficient": 0.1, "use_matryoshka_aux_loss": True},
            {},
            "aux_loss_coefficient=0, or .* for all levels together",
        ),
        ("switch", {}, {"optimizer": "row_sparse_adam"}, "optimizer='adam'"),
    ],
)
def test_what_cannot_be_captured_is_refused(architecture, sae, run, without):
    with pytest.raises(ValueError, match=f"cuda_graph must be False without {without}; got True"):
        make_trainer(make_sae(architecture, **sae), cuda_graph=True, **run)


def test_batches_go_through_one_memory_and_others_past_it():
    places = []

    def step(x):
        places.append(x.data_ptr())
        return x.sum()

    graph = StepGraph(step)
    batches = [torch.randn(4, 3) for _ in range(5)]
    odd = torch.randn(2, 3)
    for x in (*batches, odd, *batches):
        assert torch.equal(graph(x), x.sum())
    assert len(set(places)) == 2
    assert places[5] == odd.data_ptr()
    graph.forget()
    assert graph.x_BD is None
