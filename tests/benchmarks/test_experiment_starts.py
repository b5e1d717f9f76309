"""How the experts of an SAE in the experiments start: as copies, from one trained alone, as parts of a TopK SAE."""

import cells
import torch
import training


def test_experts_that_start_as_copies_are_the_same_and_still_take_their_biases_from_data(layer):
    cell = cells.Cell("", "switch", 64, 4, 2, 0, (640,), lr=2e-3, batch=32, start="copies")
    trainer = training.make_trainer(cell, layer, 640)
    sae = trainer.sae
    assert torch.equal(sae.W_dec[:32], sae.W_dec[32:])
    assert torch.equal(sae.W_enc[:, :32], sae.W_enc[:, 32:])
    assert not torch.equal(sae.W_dec[0], sae.W_dec[1])
    assert sae.is_fresh
    trainer.step(next(trainer.data_provider))
    assert not sae.is_fresh
    assert not torch.equal(sae.W_dec[:32], sae.W_dec[32:])


def test_a_shared_expert_is_trained_on_the_first_tenth_of_the_run(layer, tmp_path):
    cell = cells.Cell("", "switch", 64, 4, 2, 0, (640,), lr=2e-3, batch=32, start="shared")
    alone = training.make_trainer(cells.Cell("", "sparse_topk", 32, 4, 1, 0, (640,), lr=2e-3, batch=32), layer, 640)
    before = alone.sae.W_dec.clone()
    for _ in range(2):
        alone.step(next(alone.data_provider))
        alone.n_training_steps += 1
    trainer = training.resumed(cell, layer, 640, tmp_path)
    assert (trainer.n_training_steps, trainer.n_training_samples) == (2, 64)
    for expert in trainer.sae.W_dec.split(32):
        assert torch.equal(expert, alone.sae.W_dec)
        assert not torch.equal(expert, before)
    assert torch.equal(next(trainer.data_provider), next(alone.data_provider))
    training.train(cell, layer, tmp_path / "cell")
    (found,) = training.finished(cell, tmp_path / "cell")
    assert (found["took"]["steps"], found["row"]["steps"]) == (18, 20)


def test_a_split_sae_is_parts_of_a_topk_sae_that_saw_half_of_the_tokens(layer, tmp_path, monkeypatch):
    cell = cells.Cell("", "switch", 64, 4, 2, 0, (1280,), lr=2e-3, batch=32, start="split")
    seen, split = {}, training.split_topk

    def noting(sae, n_experts, x, **options):
        seen.update(sae=sae, split=split(sae, n_experts, x, **options), n_experts=n_experts)
        return seen["split"]

    monkeypatch.setattr(training, "split_topk", noting)
    trainer = training.resumed(cell, layer, 1280, tmp_path)
    assert (seen["sae"].cfg.architecture(), seen["sae"].cfg.d_sae, seen["n_experts"]) == ("sparse_topk", 64, 2)
    for name, t in seen["split"].state_dict().items():
        assert torch.equal(trainer.sae.state_dict()[name], t), name
    assert not trainer.sae.is_fresh
    assert (trainer.n_training_steps, trainer.n_training_samples) == (20, 640)
    norms = trainer.sae.W_dec.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones_like(norms))
    before = training.error(trainer.sae, layer.held_out)["fvu"]
    batch = next(trainer.data_provider)
    expected = training.make_trainer(cell, layer, 1280).data_provider
    for _ in range(20):
        next(expected)
    assert torch.equal(batch, next(expected))
    assert before < 2
