"""Fine-tuning: an SAE in training that starts from the weights of a trained one."""

import copy
import json
from pathlib import Path
from typing import TypeAlias

import torch
from sae_lens.constants import SAE_CFG_FILENAME
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.abstopk_sae import AbsTopKSAE, AbsTopKTrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUTrainingSAE
from sae_lens.saes.sae import SAE, TrainingSAE, TrainingSAEConfig
from sae_lens.saes.standard_sae import StandardSAE, StandardTrainingSAE
from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE
from torch import Tensor

from sae_lens_switch.common.types import AnySAE, AnyTrainingSAE
from sae_lens_switch.saes.config import layout_of
from sae_lens_switch.saes.serialization import fold_saved_scaler
from sae_lens_switch.saes.sparse_batchtopk_sae import SparseBatchTopKTrainingSAE
from sae_lens_switch.saes.sparse_topk_sae import SparseAbsTopKTrainingSAE, SparseTopKTrainingSAE
from sae_lens_switch.saes.switch_sae import SwitchBase
from sae_lens_switch.saes.switch_training_sae import SwitchTrainingSAE
from sae_lens_switch.saes.transcoder_fields import refuse_transcoders
from sae_lens_switch.saes.weight_files import sharded_safetensors

_TopK: TypeAlias = TopKSAE | TopKTrainingSAE
_JumpReLU: TypeAlias = JumpReLUSAE | JumpReLUTrainingSAE
_Plain: TypeAlias = _TopK | _JumpReLU | StandardSAE | StandardTrainingSAE
# Relative: rows whose norms differ by no more are in the same order with and without them.
_ALIKE = 1e-3


@torch.no_grad()
def init_from(cfg: TrainingSAEConfig, source: AnySAE | str | Path) -> AnyTrainingSAE:
    """An SAE to be trained with the settings of ``cfg`` that starts from the weights of a trained one.

    Before its first step it computes what the source does, apart from another k or kind of selection. Where only one of
    the two subtracts b_dec from its input, or multiplies latents by decoder norms, biases and norms are moved to make
    up for it.

    Args:
        cfg: Config of the new SAE: ``sparse_topk``, ``sparse_batchtopk``, ``sparse_matryoshka_batchtopk``,
            ``sparse_abstopk`` or ``switch``.
        source: For the first three a ``topk``, ``batchtopk``, ``jumprelu`` or ``standard`` SAE of any release; for
            ``sparse_abstopk`` an ``abstopk`` SAE; for ``switch`` a Switch SAE with the same experts (for a TopK SAE,
            see ``split_topk``). In training or not. Or the folder that holds it.

    Returns:
        The SAE, with copies of the weights, on ``cfg.device`` in ``cfg.dtype``.

    Raises:
        ValueError: If the architectures do not go together, if a shape, ``normalize_activations`` or
            ``reshape_activations`` differ, or if the new SAE's constraints would change what the weights compute.
    """
    if isinstance(source, str | Path):
        sae = _load(Path(source))
        fold_saved_scaler(sae, Path(source))
    else:
        sae = source
    refuse_transcoders("cfg", cfg)
    refuse_transcoders("source", sae.cfg)
    _check_alike(cfg, sae)
    made: AnyTrainingSAE = get_sae_training_class(cfg.architecture())[0](copy.deepcopy(cfg))
    if isinstance(made, SwitchTrainingSAE):
        _copy_switch(made, sae)
    elif isinstance(made, SparseTopKTrainingSAE):
        _copy_plain(made, sae)
    else:
        raise ValueError(
            "cfg must be of sparse_topk, sparse_batchtopk, sparse_matryoshka_batchtopk, sparse_abstopk or switch; "
            f"got {cfg.architecture()!r}"
        )
    return made


def saved_for(cfg: TrainingSAEConfig, folder: Path) -> AnyTrainingSAE:
    """What a run with this config goes on from: the SAE as it was saved in training, or ``init_from`` any other.

    Raises:
        ValueError: As ``init_from``.
    """
    fields = _read_config(folder)
    if not _was_training(fields) or fields.get("architecture") != cfg.architecture():
        return init_from(cfg, folder)
    sae = _load(folder, cfg.device)
    _check_shape(cfg, sae)
    assert isinstance(sae, TrainingSAE)
    return sae


def _load(folder: Path, device: str = "cpu") -> AnySAE:
    kind = TrainingSAE if _was_training(_read_config(folder)) else SAE
    try:
        sae: AnySAE = kind.load_from_disk(folder, device=device, converter=sharded_safetensors)
    except Exception as error:  # damaged weights can fail in any way
        raise ValueError(f"source must be a folder with an SAE; {folder}: {error!r}") from error
    return sae


def _read_config(folder: Path) -> dict[str, object]:
    try:
        return json.loads((folder / SAE_CFG_FILENAME).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"source must be a folder with an SAE; {folder}: {error!r}") from error


def _was_training(fields: dict[str, object]) -> bool:
    return "decoder_init_norm" in fields


def _check_alike(cfg: TrainingSAEConfig, sae: AnySAE) -> None:
    _check_shape(cfg, sae)
    for name in ("normalize_activations", "reshape_activations"):
        mine, theirs = vars(cfg)[name], vars(sae.cfg)[name]
        if mine != theirs:
            raise ValueError(f"{name} must be {theirs!r}, as the SAE's that training starts from; got {mine!r}")


def _check_shape(cfg: TrainingSAEConfig, sae: AnySAE) -> None:
    for name, mine, theirs in (("d_in", cfg.d_in, sae.cfg.d_in), ("d_sae", cfg.d_sae, sae.cfg.d_sae)):
        if mine != theirs:
            raise ValueError(f"{name} must be {theirs}, as the SAE's that training starts from; got {mine}")


def _copy_switch(made: SwitchTrainingSAE, sae: AnySAE) -> None:
    if not isinstance(sae, SwitchBase):
        raise ValueError(f"a switch SAE must start from another, or by split_topk; got a {type(sae).__name__}")
    if layout_of(made.cfg) != layout_of(sae.cfg):
        raise ValueError(f"experts must be {layout_of(sae.cfg)}, as the SAE's; got {layout_of(made.cfg)}")
    for name in ("gate", "n_active_experts", "apply_b_dec_to_input"):
        mine, theirs = vars(made.cfg)[name], vars(sae.cfg)[name]
        if mine != theirs:
            raise ValueError(f"{name} must be {theirs!r}, as the SAE's that training starts from; got {mine!r}")
    if made.cfg.normalize_decoder and not torch.allclose(norms := sae.W_dec.norm(dim=1), norms.new_ones(()), rtol=0.01):
        raise ValueError("normalize_decoder must be False for an SAE whose decoder rows are not of unit norm; got True")
    _check_router_bias(made, sae)
    state = sae.state_dict() | {"b_router": sae.effective_router_bias}
    found = [state.pop(name) for name in ("topk_threshold", "threshold") if name in state]
    if found and made.topk_threshold is not None:  # without one, the first steps find it
        state["topk_threshold"] = found[0]
    unknown = sorted(state.keys() - made.state_dict().keys())
    if unknown:
        raise ValueError(f"load_balancing must be as the SAE's that training starts from, which has {unknown}")
    made.load_state_dict(state, strict=False)  # an expert bias that it lacks is zero


def _check_router_bias(made: SwitchTrainingSAE, sae: SwitchBase) -> None:
    """Raises ValueError if the new router is to subtract b_dec, and the source's something else."""
    bias_D, b_dec_D = sae.effective_router_bias, sae.b_dec.to(sae.W_router.dtype)
    # In an SAE of lower precision that was trained as tied, a fold has rounded b_dec but not b_router.
    rounding = torch.finfo(sae.b_dec.dtype).eps
    if made.cfg.tie_router_bias and not torch.allclose(bias_D, b_dec_D, rtol=rounding, atol=0):
        raise ValueError("tie_router_bias must be False for an SAE whose b_router differs from its b_dec; got True")


def _copy_plain(made: SparseTopKTrainingSAE, sae: AnySAE) -> None:
    signed = isinstance(made, SparseAbsTopKTrainingSAE)
    if not isinstance(sae, _Plain) or isinstance(sae, AbsTopKSAE | AbsTopKTrainingSAE) != signed:
        names = "abstopk" if signed else "topk, batchtopk, jumprelu or standard"
        raise ValueError(f"{made.cfg.architecture()} must start from a {names} SAE; got a {type(sae).__name__}")
    W_enc_DF, b_enc_F, W_dec_FD, b_dec_D = (
        t.detach().to(made.W_enc.device, torch.promote_types(t.dtype, torch.float32))
        for t in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    )
    scale_F = _norms_to_move(made, sae, W_dec_FD)
    W_enc_DF, b_enc_F, W_dec_FD = W_enc_DF * scale_F, b_enc_F * scale_F, W_dec_FD / scale_F.unsqueeze(1)
    if sae.cfg.apply_b_dec_to_input != made.cfg.apply_b_dec_to_input:
        shift_F = b_dec_D @ W_enc_DF
        b_enc_F = b_enc_F - shift_F if sae.cfg.apply_b_dec_to_input else b_enc_F + shift_F
    made.W_enc.copy_(W_enc_DF)
    made.b_enc.copy_(b_enc_F)
    made.W_dec.copy_(W_dec_FD)
    made.b_dec.copy_(b_dec_D)
    if isinstance(made, SparseBatchTopKTrainingSAE):
        _copy_threshold(made, sae, W_dec_FD)


def _norms_to_move(made: SparseTopKTrainingSAE, sae: _Plain, W_dec_FD: Tensor) -> Tensor:
    """[F], from decoder to encoder, so that both SAEs rank latents alike. Raises ValueError where none do."""
    norm_F = W_dec_FD.norm(dim=1)
    rescales, ones_F = made.cfg.rescale_acts_by_decoder_norm, torch.ones_like(norm_F)
    if not isinstance(sae, _TopK) or sae.cfg.rescale_acts_by_decoder_norm == rescales:
        return ones_F
    if not rescales:
        return norm_F.clamp_min(1e-8)
    if norm_F.max() > (1 + _ALIKE) * norm_F.min():
        raise ValueError(
            "rescale_acts_by_decoder_norm must be False for an SAE that selects without decoder norms and whose "
            "decoder rows differ in norm; got True"
        )
    return ones_F


def _copy_threshold(made: SparseBatchTopKTrainingSAE, sae: _Plain, W_dec_FD: Tensor) -> None:
    """The running threshold, of latents as they are selected; a TopK SAE has none, and the first steps find it."""
    if isinstance(sae, BatchTopKTrainingSAE):
        grows = made.cfg.rescale_acts_by_decoder_norm and not sae.cfg.rescale_acts_by_decoder_norm
        scale = W_dec_FD.norm(dim=1).double().mean() if grows else 1  # all norms are equal then
        made.topk_threshold.copy_(sae.topk_threshold.to(W_dec_FD.device) * scale)
    elif isinstance(sae, _JumpReLU):
        threshold_F = sae.threshold.detach().to(W_dec_FD)
        scaled = made.cfg.rescale_acts_by_decoder_norm
        made.topk_threshold.copy_((threshold_F * W_dec_FD.norm(dim=1) if scaled else threshold_F).mean())
