"""Transcoders trained on two hooks of a language model by the runner, and evaluated in it."""

import json
from typing import Any

import pytest
import torch
from helpers import CONTEXT, run_fields, small_run_warnings, tiny_dataset, training_config
from helpers import D as D_MODEL
from helpers.transcoders import KINDS, E, F, K, every_kind
from sae_lens import SAE, HookedSAETransformer
from sae_lens.evals import get_eval_everything_config
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.transcoder import SkipTranscoder, SkipTranscoderConfig
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor

from sae_lens_switch import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    SwitchTrainingTranscoder,
    run_transcoder_evals,
)
from sae_lens_switch.training.history import FILENAME, read_history

pytestmark = small_run_warnings
# The input is as wide as the model, the output as its MLP's hidden layer.
HOOK_IN, HOOK_OUT, D_OUT = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_post", 24


def config(path, kind: str = "switch_transcoder", **fields: Any) -> LanguageModelSAERunnerConfig:
    own = {"n_experts": E} if kind == "switch_transcoder" else {}
    hooks = {"hook_name": HOOK_IN, "hook_name_out": HOOK_OUT, "d_in": D_MODEL, "d_out": D_OUT, "d_sae": F, "k": K}
    return LanguageModelSAERunnerConfig(architecture=kind, **{**run_fields(path), **hooks, **own, **fields})


def runner(cfg, model, **options) -> LanguageModelSAETrainingRunner:
    return LanguageModelSAETrainingRunner(cfg, override_dataset=tiny_dataset(), override_model=model, **options)


def at_hooks(model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    _, cache = model.run_with_cache(tokens)
    return cache[HOOK_IN], cache[HOOK_OUT]


def test_rows_of_the_store_are_one_tokens_activations_at_both_hooks(tmp_path, model, dataset):
    """However rows are mixed: each is one of those that the model has for the dataset's tokens."""
    store = runner(config(tmp_path, exclude_special_tokens=[0], seqpos_slice=(0, 9)), model).activations_store
    x, y = at_hooks(model, torch.as_tensor(dataset[:]["tokens"]))
    known = torch.cat([x, y], dim=-1)[:, 1:9].flatten(0, 1)  # without <bos>
    for _ in range(3):
        rows = store.next_batch()
        assert rows.shape == (64, D_MODEL + D_OUT)
        assert rows.dtype == torch.float32
        assert torch.cdist(rows, known, compute_mode="donot_use_mm_for_euclid_dist").amin(1).max() < 1e-4
        assert rows[:, :D_MODEL].unique(dim=0).shape[0] > 32


def test_one_forward_pass_gives_both(tmp_path, model, monkeypatch):
    store = runner(config(tmp_path), model).activations_store
    passes = []
    run_with_cache = model.run_with_cache

    def counted(*args, **kwargs):
        passes.append(kwargs["stop_at_layer"])
        return run_with_cache(*args, **kwargs)

    monkeypatch.setattr(model, "run_with_cache", counted)
    store.get_activations(store.get_batch_tokens(4))
    assert passes == [2]


@every_kind
@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
def test_a_whole_run(kind, skip, tmp_path, model):
    cfg = config(tmp_path, kind, skip_connection=skip, n_checkpoints=1)
    trained = runner(cfg, model).run()
    assert type(trained) is KINDS[kind][0]
    loaded = SAE.load_from_disk(tmp_path / "output")
    assert (loaded.cfg.metadata.hook_name, loaded.cfg.metadata.hook_name_out) == (HOOK_IN, HOOK_OUT)
    saved = json.loads((tmp_path / "output" / "runner_cfg.json").read_text())
    assert (saved["hook_name"], saved["sae"]["hook_name_out"], saved["sae"]["d_out"]) == (HOOK_IN, HOOK_OUT, D_OUT)
    tokens = torch.tensor(tiny_dataset()[:4]["tokens"])
    x, y = at_hooks(model, tokens)
    assert loaded(x).shape == y.shape
    if kind != "sparse_batchtopk_transcoder":
        torch.testing.assert_close(loaded(x), trained(x))


def test_a_run_is_resumed_from_its_checkpoint_but_not_for_another_output(tmp_path, model):
    runner(config(tmp_path / "a", n_checkpoints=1), model).run()
    (checkpoint,) = (tmp_path / "a" / "checkpoints").glob("*/[0-9]*")
    resumed = runner(config(tmp_path / "b", n_checkpoints=1, resume=str(checkpoint)), model)
    resumed.run()
    steps = [row["step"] for row in read_history(tmp_path / "b" / "output" / FILENAME)]
    assert steps[-1] == 6
    assert len(steps) == len(set(steps))
    other = config(tmp_path / "c", resume=str(checkpoint), hook_name_out="blocks.1.mlp.hook_pre")
    with pytest.raises(ValueError, match=r"hook_name_out was '.*hook_post', is '.*hook_pre'"):
        runner(other, model).run()


# Evaluation


def evaluated(sae, model, **fields: bool) -> dict[str, Any]:
    store = ActivationsStore.from_sae(
        model, sae, tiny_dataset(), context_size=CONTEXT, store_batch_size_prompts=4, streaming=False
    )
    cfg = get_eval_everything_config(4, n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2)
    with pytest.raises(ValueError, match="compute_featurewise_weight_based_metrics must be False for a transcoder"):
        run_transcoder_evals(sae, store, model, cfg)
    vars(cfg).update(compute_featurewise_weight_based_metrics=False, **fields)
    metrics, _ = run_transcoder_evals(sae, store, model, cfg, exclude_special_tokens=False)
    return {name: value for group in metrics.values() for name, value in group.items()}


def linear_transcoder(hook_in: str, hook_out: str, W_skip: Tensor) -> SwitchTrainingTranscoder:
    """Whose latents are all dead."""
    cfg = KINDS["switch_transcoder"][1](
        d_in=W_skip.shape[1], d_out=W_skip.shape[0], d_sae=F, n_experts=E, k=K, skip_connection=True
    )
    cfg.metadata.hook_name, cfg.metadata.hook_name_out = hook_in, hook_out
    cfg.metadata.context_size, cfg.metadata.prepend_bos = CONTEXT, False
    made = SwitchTrainingTranscoder(cfg)
    with torch.no_grad():
        made.W_enc.zero_()
        made.W_skip.copy_(W_skip)
    return made


def test_a_transcoder_that_is_the_layer_it_replaces_changes_nothing(model):
    """The residual stream under the names of its two hooks between layers; the skip connection is the identity."""
    same = linear_transcoder("blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", torch.eye(D_MODEL))
    metrics = evaluated(same, model)
    assert metrics["explained_variance"] == pytest.approx(1)
    assert metrics["ce_loss_with_sae"] == pytest.approx(metrics["ce_loss_without_sae"], rel=1e-5)
    assert metrics["kl_div_with_sae"] == pytest.approx(0, abs=1e-5)
    assert metrics["ce_loss_with_ablation"] != pytest.approx(metrics["ce_loss_without_sae"], rel=1e-4)
    nothing = evaluated(linear_transcoder(HOOK_IN, HOOK_OUT, torch.zeros(D_OUT, D_MODEL)), model)
    assert nothing["ce_loss_with_sae"] == pytest.approx(nothing["ce_loss_with_ablation"])
    assert nothing["l2_norm_out"] == 0
    assert model.hook_dict[HOOK_IN].fwd_hooks == []


def test_metrics_are_of_the_target_with_skip_connection_also_of_saelens_own_class(model):
    fields = {"d_in": D_MODEL, "d_out": D_OUT, "d_sae": F, "apply_b_dec_to_input": False}
    sae = SkipTranscoder(SkipTranscoderConfig(**fields))
    torch.nn.init.normal_(sae.W_skip, std=0.1)
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = HOOK_IN, HOOK_OUT
    sae.cfg.metadata.context_size, sae.cfg.metadata.prepend_bos = CONTEXT, False
    metrics = evaluated(sae, model, compute_ce_loss=False, compute_kl=False)  # of the first eight sequences
    x, y = (t.flatten(0, 1).double() for t in at_hooks(model, torch.tensor(tiny_dataset()[:8]["tokens"])))
    error = (sae(x.float()).double() - y).square().sum(1).mean()
    assert metrics["mse"] == pytest.approx(float(error), rel=1e-3)
    assert metrics["explained_variance"] == pytest.approx(float(1 - error / (y - y.mean(0)).square().sum(1).mean()))
    assert metrics["l2_norm_in"] == pytest.approx(float(y.norm(dim=1).mean()), rel=1e-4)


def test_the_runs_own_evaluator_is_that_of_a_transcoder(tmp_path, model):
    made = runner(config(tmp_path), model)
    made._set_sae_metadata()
    from sae_lens.training.activation_scaler import ActivationScaler

    metrics = made.evaluator(made.sae, made.activations_store, ActivationScaler())
    assert {"ce_loss_with_sae", "ce_loss_without_sae"} <= metrics["model_performance_preservation"].keys()
    assert metrics["sparsity"]["l0"] <= K
    sae = made.sae
    sae.cfg.metadata.hook_name_out = None
    with pytest.raises(ValueError, match="metadata.hook_name_out must name a hook of the model; got None"):
        made.evaluator(sae, made.activations_store, ActivationScaler())


def test_saelens_hooked_transformer_puts_it_in_the_layers_place(tmp_path, model):
    assert isinstance(model, HookedSAETransformer)
    trained = runner(config(tmp_path), model).run()
    tokens = torch.tensor(tiny_dataset()[:4]["tokens"])
    x, _ = at_hooks(model, tokens)
    logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK_OUT, lambda acts, hook: trained(x))])  # noqa: ARG005
    with model.saes(saes=[trained]):
        torch.testing.assert_close(model(tokens), logits)


# What cannot be


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hook_name_out": None}, "hook_name_out must name a hook to train switch_transcoder; got None"),
        ({"hook_head_index": 1}, "hook_head_index must be None to train switch_transcoder; got 1"),
        ({"hook_name_out": "blocks.1.mlp.hook_pots"}, r"hook_name_out must be a hook of tiny; .* did you mean"),
        (
            {"d_out": 25},
            r"d_out must be the width of tiny's activations at blocks\.1\.mlp\.hook_post, 24; got d_out=25",
        ),
        ({"d_in": 13}, r"d_in must be the width of tiny's activations at .*, 12; got d_in=13"),
    ],
)
def test_a_run_no_transcoder_can_have(fields, message, tmp_path, model):
    with pytest.raises(ValueError, match=message):
        runner(config(tmp_path, **fields), model).run()


def test_a_typo_is_found_before_the_model_is_loaded(tmp_path):
    with pytest.raises(ValueError, match="hook_name_out must be a hook of TransformerLens"):
        LanguageModelSAETrainingRunner(config(tmp_path, hook_name_out="blocks.1.hook_mlp_uot"), tiny_dataset())


def test_a_run_of_several_saes_refuses_it_by_name(tmp_path, model):
    cfg = config(tmp_path)
    several = {"a": cfg.sae, "b": training_config(dtype="float32")}
    known = MultiSAETrainingRunnerConfig.__dataclass_fields__
    fields = {name: value for name, value in run_fields(tmp_path).items() if name in known}
    multi = MultiSAETrainingRunnerConfig(saes=several, hook_names=HOOK_IN, **fields)
    with pytest.raises(ValueError, match="a run of many SAEs must not be a transcoder; got switch_transcoder"):
        MultiSAETrainingRunner(multi, tiny_dataset(), model)
