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
    batch: RowBatch

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
        made = self._new_of(d_sae=self._block_width, k=1)
        assert isinstance(made, SparseTopKTrainingSAE)
        return made

    # The step

    def begin(self, n_tokens: int, n_dead: int) -> None:
        """Tell all processes how many tokens a step has here, and how many of these latents are dead."""
        self.batch = RowBatch.of(n_tokens, n_dead, self.ranks)

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
        codes, dead_codes = self._choose(x_BD, scale_F, dead)
        parts = decode_chosen(
            x_BD,
            self.W_enc.T,
            self.W_dec,
            codes,
            pre_bias_D=self.pre_bias,
            bias_F=self.b_enc,
            dead=dead_codes,
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
            return best.chosen(is_chosen_BC).after_relu(), None
        best_dead, ranked_dead_BC = self._best_dead(x_BD, scale_F, dead.indices_N, dead.aux_k)
        found = self.batch.choose([best.ranked_BC, ranked_dead_BC], [self.whole.k, dead.aux_k])
        return best.chosen(found[0]).after_relu(), chosen_dead(dead.indices_N, best_dead, found[1])

    def _best(self, x_BD: Tensor, scale_F: Tensor | None, n: int, over_batch: bool = False) -> Candidates:
        """The n best of these latents, for each token or the batch."""
        return topk_candidates(
            x_BD,
            self.W_enc.detach().T,
            n,
            pre_bias_D=self.pre_bias,
            bias_F=self.b_enc.detach(),
            scale_F=scale_F,
            encoder_precision=self.encoder_precision,
            over_batch=over_batch,
        )

    # AuxK: of the dead latents of all processes

    def _best_dead(self, x_BD: Tensor, scale_F: Tensor | None, dead_N: Tensor, aux_k: int) -> tuple[Candidates, Tensor]:
        """The best dead latents; and what they are ranked by, with as many columns as on the process that has most."""
        n = min(aux_k, len(dead_N))
        if n == 0:
            none = x_BD.new_empty(len(x_BD), 0)
            best = Candidates(none, none.long(), none.to(torch.promote_types(none.dtype, torch.float32)))
        else:
            scale_N = None if scale_F is None else scale_F[dead_N]
            W_ND, bias_N = self.W_enc.detach().T[dead_N], self.b_enc.detach()[dead_N]
            best = topk_candidates(x_BD, W_ND, n, pre_bias_D=self.pre_bias, bias_F=bias_N, scale_F=scale_N)
        return best, pad(best.ranked_BC, (0, min(aux_k, max(self.batch.n_dead)) - n), value=-torch.inf)

    @override
    def _dead_latents(self, dead_F: Tensor | None) -> DeadLatents:
        aux_k = min(self.aux_k, sum(self.batch.n_dead))
        if dead_F is None or aux_k == 0:
            return DeadLatents(None, 0)
        return DeadLatents(dead_F.nonzero().flatten(), aux_k)

    @override
    def _n_dead(self, dead_N: Tensor, dead_F: Tensor | None, assignment: Assignment | None) -> int:
        return sum(self.batch.n_dead)


def chosen_dead(dead_N: Tensor, best: Candidates, is_chosen_BC: Tensor) -> Dead:
    return Dead(dead_N, best.chosen(is_chosen_BC[:, : best.ranked_BC.shape[1]]))
