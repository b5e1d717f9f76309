"""The latents of one process: a TopK SAE over its own part of the dictionary, with the reconstruction of the whole."""

from dataclasses import replace

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import Reconstruction, RowGrads
from sae_lens_switch_kernels.chosen import Candidates, Codes, Dead, decode_chosen, topk_candidates
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from sae_lens_switch.parallel.latent_exchange import RowBatch
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.parallel.shard import Shard
from sae_lens_switch.saes.config import SparseTopKTrainingSAEConfig
from sae_lens_switch.saes.router import Assignment
from sae_lens_switch.saes.sparse_topk_sae import SparseTopKTrainingSAE
from sae_lens_switch.saes.step import DeadLatents, SparseStepOutput

# Initialised at a time: few enough for any memory.
_BLOCK = 4096


class LatentShard(Shard, SparseTopKTrainingSAE):
    """F / P consecutive latents of a TopK SAE, as trained by one process of P.

    A step encodes the tokens of the whole row with its own latents, and decodes those that are among the k best of all
    latents. Loss and error are those of the tokens of its own batch, with the reconstruction of all processes.
    """

    whole: SparseTopKTrainingSAEConfig

    def __init__(self, whole: SparseTopKTrainingSAEConfig, ranks: Ranks) -> None:
        self._batch: RowBatch | None = None
        super().__init__(whole, ranks)

    @classmethod
    @override
    def _part_of(cls, whole: SparseTopKTrainingSAEConfig, P: int) -> SparseTopKTrainingSAEConfig:
        if whole.d_sae % P:
            raise ValueError(f"latent_parallel must divide d_sae; got {P} and {whole.d_sae}")
        width = whole.d_sae // P
        return replace(whole, d_sae=width, k=min(whole.k, width))

    @property
    @override
    def _block_width(self) -> int:
        return min(_BLOCK, self.whole.d_sae)

    @override
    def _new_block(self) -> SparseTopKTrainingSAE:
        return SparseTopKTrainingSAE(replace(self.whole, d_sae=self._block_width, k=1, device="cpu"))

    # The step

    def begin(self, n_tokens: int, n_dead: int) -> None:
        """Tell all processes how many tokens a step has here, and how many of these latents are dead."""
        self._batch = RowBatch.of(n_tokens, n_dead, self.ranks)

    @property
    def batch(self) -> RowBatch:
        assert self._batch is not None, "a step begins with begin()"
        return self._batch

    @property
    @override
    def n_tokens(self) -> int:
        return self.batch.n_tokens

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """The step of the tokens at home here. Its codes are this process's latents, of all tokens of the row."""
        if self.has_dense_hooks:
            raise ValueError(
                "hook_sae_acts_pre and hook_sae_acts_post must have no hooks with latents on several processes"
            )
        output = super().training_forward_pass(step_input)
        assert isinstance(output, SparseStepOutput)
        output.codes = output.codes.view(sum(self.batch.sizes))
        return output

    @override
    def _autoencode(
        self, inputs_BD: Tensor, assignment: Assignment | None, dead: DeadLatents, row_grads: RowGrads | None
    ) -> tuple[Reconstruction, Tensor]:
        with torch.no_grad():
            scale_F = self._selection_scale()
            x_BD = self.batch.to_all(inputs_BD, "tokens")
        codes, chosen_dead = self._choose(x_BD, scale_F, dead)
        parts = decode_chosen(
            x_BD,
            self.W_enc.T,
            self.W_dec,
            codes,
            pre_bias_D=self.pre_bias,
            bias_F=self.b_enc,
            dead=chosen_dead,
            row_grads=row_grads,
        )
        out_nD, *aux_out_nD = self.batch.summed([part_BD for part_BD in parts if part_BD is not None])
        aux = aux_out_nD[0] if aux_out_nD else None
        result = Reconstruction(out_nD, codes.values_S, codes.indices_S, aux, None, codes.offsets_B1)
        return result, codes.values_S if scale_F is None else codes.values_S * scale_F[codes.indices_S]

    def _choose(self, x_BD: Tensor, scale_F: Tensor | None, dead: DeadLatents) -> tuple[Codes, Dead | None]:
        """Which of these latents are among the k best of all, and which dead ones among the aux_k best dead ones."""
        best = self._best(x_BD, scale_F, self.cfg.k)
        if dead.indices_N is None:
            (is_chosen_BC,) = self.batch.choose([best.ranked_BC], [self.whole.k])
            return _after_relu(best.chosen(is_chosen_BC)), None
        n = min(dead.aux_k, len(dead.indices_N))
        best_dead = self._best(x_BD, scale_F, n, dead.indices_N)
        as_many = min(dead.aux_k, max(self.batch.n_dead)) - n  # as on the process that has most
        ranked = [best.ranked_BC, pad(best_dead.ranked_BC, (0, as_many), value=-torch.inf)]
        is_chosen_BC, is_chosen_dead_BC = self.batch.choose(ranked, [self.whole.k, dead.aux_k])
        chosen_dead = best_dead.chosen(is_chosen_dead_BC[:, :n])
        return _after_relu(best.chosen(is_chosen_BC)), Dead(dead.indices_N, chosen_dead)

    def _best(self, x_BD: Tensor, scale_F: Tensor | None, n: int, among_N: Tensor | None = None) -> Candidates:
        """The n best of these latents, or of some of them, for each token."""
        W_FD, bias_F = self.W_enc.detach().T, self.b_enc.detach()
        if among_N is None:
            options = {"scale_F": scale_F, "encoder_precision": self.encoder_precision}
            return topk_candidates(x_BD, W_FD, n, pre_bias_D=self.pre_bias, bias_F=bias_F, **options)
        if n == 0:
            none = x_BD.new_empty(len(x_BD), 0)
            return Candidates(none, none.long(), none.to(torch.promote_types(none.dtype, torch.float32)))
        scale_N = None if scale_F is None else scale_F[among_N]
        W_ND, bias_N = W_FD[among_N], bias_F[among_N]
        return topk_candidates(x_BD, W_ND, n, pre_bias_D=self.pre_bias, bias_F=bias_N, scale_F=scale_N)

    # AuxK: of the dead latents of all processes

    @override
    def _dead_latents(self, dead_F: Tensor | None) -> DeadLatents:
        aux_k = min(self.aux_k, sum(self.batch.n_dead))
        if dead_F is None or aux_k == 0:
            return DeadLatents(None, 0)
        return DeadLatents(dead_F.nonzero().flatten(), aux_k)

    @override
    def _n_dead(self, dead_N: Tensor, dead_F: Tensor | None, assignment: Assignment | None) -> int:
        return sum(self.batch.n_dead)


def _after_relu(codes: Codes) -> Codes:
    return codes._replace(values_S=codes.values_S.relu())
