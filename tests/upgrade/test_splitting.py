"""split_topk: a TopK SAE divided into the experts of a Switch SAE."""

import json

import pytest
import torch
from helpers import HOOK, largest_allocation
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

from sae_lens_switch import (
    SparseSAETrainer,
    SparseSAETrainerConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
    SwitchTrainingSAE,
    split_topk,
)
from sae_lens_switch.upgrade import split
from sae_lens_switch.upgrade.__main__ import main
from sae_lens_switch.upgrade.encoder_fit import with_bias_folded
from sae_lens_switch.upgrade.sources import topk_of

D, E, M, K = 15, 3, 5, 2
F = E * M
N = 1200


def orthogonal_blocks(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A dictionary of orthonormal rows, shuffled; the block of each; and tokens of K latents of one block each."""
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))[0][:F]
    block_F = torch.arange(F)[torch.randperm(F, generator=generator)] % E
    b_dec_D = torch.randn(D, generator=generator, dtype=torch.float64)
    block_N = torch.randint(E, (N,), generator=generator)
    codes_NF = torch.rand(N, F, generator=generator, dtype=torch.float64) + 0.5
    codes_NF[block_N.unsqueeze(1) != block_F] = 0
    keep = torch.rand(N, F, generator=generator).masked_fill(codes_NF == 0, -1).topk(K).indices
    codes_NF = torch.zeros_like(codes_NF).scatter(1, keep, codes_NF.gather(1, keep))
    return W_dec_FD, block_F, b_dec_D, codes_NF @ W_dec_FD + b_dec_D


def topk_sae(W_dec_FD: torch.Tensor, b_dec_D: torch.Tensor, norm_F: torch.Tensor | float = 1.0, **fields) -> TopKSAE:
    """TopK with these rows, of these norms."""
    fields = {"d_in": D, "d_sae": len(W_dec_FD), "k": K, "dtype": "float64", **fields}
    return set_weights(TopKSAE(TopKSAEConfig(**fields)), W_dec_FD, b_dec_D, norm_F)


@torch.no_grad()
def set_weights(sae, W_dec_FD, b_dec_D, norm_F=1.0):
    norm_F = torch.as_tensor(norm_F, dtype=torch.float64).expand(len(W_dec_FD)).unsqueeze(1)
    sae.W_dec.copy_(W_dec_FD * norm_F)
    sae.W_enc.copy_((W_dec_FD / norm_F).T)
    sae.b_dec.copy_(b_dec_D)
    return sae


def learnable(n: int = N, seed: int = 5) -> torch.Tensor:
    """Mixtures of a few directions out of one of three groups, off centre."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 8, D, generator=generator)
    active = torch.rand(n, 8, generator=generator) < 0.3
    strength = (torch.rand(n, 8, generator=generator) + 0.5) * active
    group = torch.randint(3, (n,), generator=generator)
    return (strength.unsqueeze(1) @ directions[group]).squeeze(1) + torch.randn(D, generator=generator)


def fvu(sae, x: torch.Tensor) -> float:
    with torch.no_grad():
        return float((sae.decode(sae.encode(x)) - x).square().sum() / (x - x.mean(0)).square().sum())


# --- What a split preserves


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_that_never_fire_together_become_the_experts(seed):
    W_dec_FD, block_F, b_dec_D, x = orthogonal_blocks(seed)
    made = split(topk_sae(W_dec_FD, b_dec_D), E, x)
    blocks_EM = block_F[made.latents_F].view(E, M)
    assert sorted(made.latents_F.tolist()) == list(range(F))
    assert all(len(set(blocks.tolist())) == 1 for blocks in blocks_EM)
    assert len(set(blocks_EM[:, 0].tolist())) == E
    assert made.report.captured == pytest.approx(1)
    assert made.report.agreement == 1


@pytest.mark.parametrize("rescales", [True, False])
def test_on_separable_blocks_the_reconstruction_is_topks(rescales):
    W_dec_FD, _, b_dec_D, x = orthogonal_blocks()
    norm_F = torch.linspace(0.5, 2, F, dtype=torch.float64) if rescales else 3.0
    topk = topk_sae(W_dec_FD, b_dec_D, norm_F, rescale_acts_by_decoder_norm=rescales)
    exact = split_topk(topk, E, x, switch_fields={"gate": "one"})
    torch.testing.assert_close(exact(x), topk(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(exact.W_dec.norm(dim=1), torch.ones(F, dtype=torch.float64))
    assert exact.cfg.normalize_decoder
    assert fvu(split_topk(topk, E, x), x) < 1e-3  # gates of nearly 1


def test_latents_are_topks_in_another_order():
    W_dec_FD, _, b_dec_D, x = orthogonal_blocks()
    made = split(topk_sae(W_dec_FD, b_dec_D), E, x, switch_fields={"gate": "one"})
    expected = topk_sae(W_dec_FD, b_dec_D).encode(x)[:, made.latents_F]
    torch.testing.assert_close(made.sae.encode(x), expected, rtol=1e-6, atol=1e-6)


def test_norms_that_decide_nothing_stay_and_the_decoder_is_left_unnormalized():
    """Without rescaling, a latent of a small decoder row is selected for its activation alone."""
    W_dec_FD, _, b_dec_D, x = orthogonal_blocks()
    norm_F = torch.linspace(0.5, 2, F, dtype=torch.float64)
    topk = topk_sae(W_dec_FD, b_dec_D, norm_F, rescale_acts_by_decoder_norm=False)
    made = split(topk, E, x, switch_fields={"gate": "one"})
    assert not made.sae.cfg.normalize_decoder
    torch.testing.assert_close(made.sae.W_dec.norm(dim=1), norm_F[made.latents_F])
    with pytest.raises(ValueError, match="normalize_decoder must be False"):
        split_topk(topk, E, x, switch_fields={"normalize_decoder": True})


@pytest.mark.parametrize("gate", ["probability", "one"])
def test_each_experts_factor_leaves_a_residual_orthogonal_to_its_reconstruction(gate):
    """The condition of least squares, from a dense product per expert."""
    topk = TopKSAE(TopKSAEConfig(d_in=D, d_sae=24, k=4, dtype="float64"))
    x = learnable().double()
    sae = split_topk(topk, 4, x, switch_fields={"gate": gate})
    f_NF = sae.encode(x)
    for e in range(4):
        part_NF = torch.zeros_like(f_NF)
        part_NF[:, e * 6 : (e + 1) * 6] = f_NF[:, e * 6 : (e + 1) * 6]
        mine = part_NF.abs().sum(1) > 0
        y = part_NF[mine] @ sae.W_dec
        residual = x[mine] - sae.b_dec - y
        assert (residual * y).sum().abs().item() < 1e-6 * y.square().sum().item()


def test_a_bias_is_linear_where_tokens_lie_to_one_side():
    x = learnable().double() + 4
    topk = topk_of(set_bias(TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64"))), None, x)
    expert_N = torch.arange(N) % E
    folded = with_bias_folded(topk, x, expert_N, E)
    expected_NF = x @ topk.W_enc_FD.T + topk.b_enc_F
    for e in range(E):
        block = slice(e * M, (e + 1) * M)
        off = (x[expert_N == e] @ folded.W_enc_FD[block].T - expected_NF[expert_N == e][:, block]).abs()
        assert off.mean() < 0.1 * topk.b_enc_F.abs().mean()


def set_bias(sae):
    with torch.no_grad():
        sae.b_enc.copy_(torch.linspace(-1, 1, sae.cfg.d_sae))
    return sae


def test_the_report_says_what_the_bias_became_and_the_better_of_two_is_taken():
    x = learnable().double()
    plain = TopKSAE(TopKSAEConfig(d_in=D, d_sae=F, k=K, dtype="float64"))
    assert split(plain, E, x).report.encoder_bias == "none"
    made = split(set_bias(plain), E, x)
    assert made.report.encoder_bias in ("folded", "dropped")
    assert made.report.fvu_after == pytest.approx(fvu(made.sae, x), rel=1e-6)
    assert made.report.fvu_before == pytest.approx(fvu(plain, x), rel=1e-6)
    assert made.sae.cfg.metadata.split["encoder_bias"] == made.report.encoder_bias


# --- What is accepted


@pytest.mark.parametrize(
    ("sae_class", "config_class"),
    [
        (TopKSAE, TopKSAEConfig),
        (TopKTrainingSAE, TopKTrainingSAEConfig),
        (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
        (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
    ],
)
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_every_topk_splits_into_a_switch_sae_of_its_kind(sae_class, config_class, normalization):
    metadata = SAEMetadata(hook_name=HOOK, model_name="tiny")
    cfg = config_class(d_in=D, d_sae=F, k=K, dtype="bfloat16", normalize_activations=normalization, metadata=metadata)
    sae = sae_class(cfg)
    before = {name: p.clone() for name, p in sae.named_parameters()}
    made = split_topk(sae, E, learnable(300))
    assert type(made) is SwitchTrainingSAE
    assert (made.cfg.k, made.cfg.d_sae, made.cfg.n_experts, made.cfg.dtype) == (K, F, E, "bfloat16")
    assert made.W_dec.dtype == torch.bfloat16
    assert made.W_router.dtype == torch.float32
    assert made.cfg.normalize_activations == normalization
    assert made.cfg.metadata.hook_name == HOOK
    assert "split" not in metadata
    assert not made.is_fresh
    assert all(torch.equal(p, before[name]) for name, p in sae.named_parameters())


def test_batchtopk_is_the_same_before_and_after_it_is_saved(tmp_path):
    x = learnable()
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=F, k=2.4, rescale_acts_by_decoder_norm=True))
    pre = (x - sae.b_dec) @ sae.W_enc * sae.W_dec.norm(dim=1)
    sae.topk_threshold.fill_(pre.detach().flatten().sort(descending=True).values[int(2.4 * N)].item())
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert loaded.cfg.architecture() == "jumprelu"
    before, after = (topk_of(s, None, x) for s in (sae, loaded))
    assert before.k == after.k == 2
    assert before.unit_rows
    assert after.unit_rows
    torch.testing.assert_close(before.W_enc_FD, after.W_enc_FD)
    torch.testing.assert_close(before.W_dec_FD, after.W_dec_FD)
    made = split(loaded, E, x)
    assert (made.report.architecture, made.sae.cfg.k) == ("jumprelu", 2)


def jumprelu(threshold_F: torch.Tensor) -> JumpReLUSAE:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=F))
    sae.threshold.data.copy_(threshold_F)
    return sae


def weird(**fields) -> TopKSAE:
    return TopKSAE(TopKSAEConfig(**{"d_in": D, "d_sae": F, "k": K, **fields}))


def not_finite() -> TopKSAE:
    sae = weird()
    sae.W_dec.data[1, 2] = torch.nan
    return sae


DECIDED = {"k": 3, "n_active_experts": 2, "activation": "batchtopk"}
REFUSED = {
    "another architecture": (lambda: StandardSAE(StandardSAEConfig(d_in=D, d_sae=F)), {}, "got 'standard'"),
    "thresholds that differ": (lambda: jumprelu(torch.linspace(0.1, 1, F)), {}, "threshold .* got 0.1 to 1"),
    "a negative threshold": (lambda: jumprelu(torch.full((F,), -0.5)), {}, "non-negative"),
    "scaling": (lambda: weird(normalize_activations="expected_average_only_in"), {}, "must be folded"),
    "whitening": (lambda: weird(normalize_activations="covariance_whitening"), {}, "must be folded"),
    "NaN in the weights": (not_finite, {}, "finite weights; W_dec has not"),
    "experts that do not divide": (weird, {"n_experts": 4}, "n_experts must divide d_sae=15; got 4"),
    "no experts": (weird, {"n_experts": 0}, "n_experts must be a whole number, at least 1"),
    "k above an expert's width": (lambda: weird(k=6), {}, "the latents of one expert; got k=6"),
    "k of zero": (weird, {"k": 0}, "k must be a whole number, at least 1"),
    "k above the dictionary": (weird, {"k": 99}, "k must be between 1 and d_sae=15; got 99"),
    "other activations": (weird, {"activations": torch.randn(9, D + 1)}, "d_in must be the width"),
    "NaN in the activations": (weird, {"activations": torch.full((9, D), torch.nan)}, "activations must be finite"),
    "no activations": (weird, {"activations": iter([])}, "at least one token; got none"),
    "two tokens": (weird, {"activations": torch.randn(2, D)}, "at least 3 tokens; got 2"),
    "no tokens": (weird, {"n_tokens": 0}, "n_tokens must be"),
    "an unknown field": (weird, {"switch_fields": {"gates": "one"}}, "unknown field 'gates'; did you mean 'gate'"),
    "decided fields": (weird, {"switch_fields": DECIDED}, "must not hold activation, k, n_active_experts"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_refuses(case):
    make, arguments, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        split_topk(**{"sae": make(), "n_experts": E, "activations": learnable(50), **arguments})


# --- How


def test_two_runs_give_the_same_bits_and_batches_may_come_one_by_one():
    x = learnable()
    sae = weird()
    first, second, streamed = (split_topk(sae, E, a) for a in (x, x.clone(), iter(x.split(100))))
    for name, p in first.named_parameters():
        assert torch.equal(p, second.get_parameter(name))
        assert torch.equal(p, streamed.get_parameter(name))


def test_no_tensor_of_tokens_by_latents_is_made():
    wide = weird(d_sae=1024, k=4)
    x = torch.randn(6000, D)
    assert largest_allocation(lambda: split_topk(wide, 4, x)) < 6000 * 1024 * 4 / 2


def test_saved_and_loaded_it_computes_the_same_and_is_not_initialised_again(tmp_path):
    x = learnable()
    sae = split_topk(weird(), E, x)
    sae.save_model(tmp_path / "training")
    loaded = SwitchTrainingSAE.load_from_disk(tmp_path / "training")
    assert torch.equal(sae(x), loaded(x))
    assert not loaded.is_fresh
    assert loaded.cfg.metadata.split == sae.cfg.metadata.split
    sae.save_inference_model(tmp_path / "inference")
    torch.testing.assert_close(SAE.load_from_disk(tmp_path / "inference")(x), sae(x))


def train(sae, x: torch.Tensor, n_tokens: int) -> None:
    cfg = SparseSAETrainerConfig(
        total_training_samples=n_tokens, train_batch_size_samples=100, lr=3e-3, checkpoint_path=None
    )
    SparseSAETrainer(cfg, sae, x).fit()


def test_fine_tuning_lowers_the_error():
    x = learnable(4000)
    torch.manual_seed(0)
    topk = SparseTopKTrainingSAE(SparseTopKTrainingSAEConfig(d_in=D, d_sae=24, k=3, aux_loss_coefficient=0.0))
    train(topk, x, 20_000)
    sae = split_topk(topk, 3, x)
    before = fvu(sae, x)
    train(sae, x, 20_000)
    assert fvu(sae, x) < 0.9 * before


# --- The command


def test_the_command_splits_and_then_grows_what_is_in_folders(tmp_path, capsys):
    from safetensors.torch import save_file

    x = learnable()
    weird().save_model(tmp_path / "topk")
    save_file({"activations": x}, tmp_path / "x.safetensors")
    shared = ["--activations", str(tmp_path / "x.safetensors"), "--output"]
    main(["split", str(tmp_path / "topk"), "--n-experts", "3", *shared, str(tmp_path / "switch")])
    said = capsys.readouterr().out
    cfg = json.loads((tmp_path / "switch" / "cfg.json").read_text())
    assert f"FVU {cfg['metadata']['split']['fvu_before']:.4f} before" in said
    main(["grow", str(tmp_path / "switch"), "--n-experts", "4", *shared, str(tmp_path / "grown")])
    grown = SwitchTrainingSAE.load_from_disk(tmp_path / "grown")
    assert (grown.cfg.n_experts, grown.cfg.d_sae) == (4, 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sae": "nothing"}, "SAE must be a folder with an SAE"),
        ({"--output": "topk"}, "--output must be a new folder"),
        ({"--activations": "topk/cfg.json"}, "--activations must be a folder or a .safetensors file"),
        ({"--activations": "topk/sae_weights.safetensors"}, "must hold one tensor"),
        ({"--n-experts": "4"}, "n_experts must divide d_sae=15"),
        ({"command": "grow"}, "SAE must be a switch SAE in training"),
    ],
)
def test_the_command_says_what_is_wrong_and_exits_with_2(change, message, tmp_path, capsys, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.chdir(tmp_path)
    weird().save_model("topk")
    save_file({"activations": learnable()}, "x.safetensors")
    arguments = {"command": "split", "sae": "topk", "--n-experts": "3", "--activations": "x.safetensors"}
    arguments |= {"--output": "new"} | change
    command, sae = arguments.pop("command"), arguments.pop("sae")
    with pytest.raises(SystemExit) as stopped:
        main([command, sae, *(part for pair in arguments.items() for part in pair)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
