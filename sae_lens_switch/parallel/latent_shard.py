"""The latents of one process: a TopK SAE over its own part of the dictionary, with the reconstruction of the whole."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens_switch_kernels import Reconstruction, RowGrads
from sae_lens_switch_kernels.chosen import Candidates, Codes, Dead, decode_chosen, topk_candidates
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from sae_lens_switch.common.types import Options
from sae_lens_switch.parallel.latent_exchange import RowBatch
from sae_lens_switch.parallel.shard import Shard
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

    batch: RowBatch

    @classmethod
    @override
    def _part_of(cls, whole: Any, P: int) -> Any:
        if whole.d_sae % P:
            raise ValueError(f"latent_parallel must divide d_sae; got {P} and {whole.d_sae}")
        return replace(whole, **cls._fields_of(whole, whole.d_sae // P))

    @classmethod
    def _fields_of(cls, whole: Any, width: int) -> Options:
        """What the config of a part of so many latents has instead of the whole's."""
        return {"d_sae": width, "k": min(whole.k, width)}

    @property
    @override
    def _block_width(self) -> int:
        return min(_BLOCK, self.whole.d_sae)

    @override
    def _new_block(self) -> SparseTopKTrainingSAE:
        made = self._new_of(**self._fields_of(self.whole, self._block_width))
        assert isinstance(made, SparseTopKTrainingSAE)
        return made

    # The step

    def begin(self, n_tokens: int, dead_F: Tensor | None) -> None:
        """Tell all processes how many tokens a step has here, and how many of these latents are dead."""
        n_dead = [0]
        if dead_F is not None and self.needs_dead_mask:
            n_dead = [int(of_level.sum()) for of_level in self._by_level(dead_F)]
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
        # Of codes in levels, these are side by side.
        out_nX, *aux_out_nX = self.batch.summed([part.view(len(x_BD), -1) for part in parts if part is not None])
        aux = aux_out_nX[0] if aux_out_nX else None
        result = Reconstruction(out_nX, codes.values_S, codes.indices_S, aux, None, codes.offsets_B1)
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

    def _by_level(self, t_F: Tensor) -> Sequence[Tensor]:
        """Those of each level whose dead latents reconstruct a residual of their own."""
        return (t_F,)

    def _best_dead(
        self, x_BD: Tensor, scale_F: Tensor | None, dead_N: Tensor, aux_k: int, level: int = 0
    ) -> tuple[Candidates, Tensor]:
        """The best dead latents; and what they are ranked by, with as many columns as on the process that has most."""
        n, most = min(aux_k, len(dead_N)), max(of_one[level] for of_one in self.batch.n_dead)
        if n == 0:
            none = x_BD.new_empty(len(x_BD), 0)
            best = Candidates(none, none.long(), none.to(torch.promote_types(none.dtype, torch.float32)))
        else:
            scale_N = None if scale_F is None else scale_F[dead_N]
            W_ND, bias_N = self.W_enc.detach().T[dead_N], self.b_enc.detach()[dead_N]
            best = topk_candidates(x_BD, W_ND, n, pre_bias_D=self.pre_bias, bias_F=bias_N, scale_F=scale_N)
        return best, pad(best.ranked_BC, (0, min(aux_k, most) - n), value=-torch.inf)

    @override
    def _dead_latents(self, dead_F: Tensor | None) -> DeadLatents:
        n_dead_L = self.batch.n_dead_L
        aux_k = min(self.aux_k, sum(n_dead_L))
        if dead_F is None or aux_k == 0:
            return DeadLatents(None, 0)
        return DeadLatents(dead_F.nonzero().flatten(), aux_k, tuple(n_dead_L) if len(n_dead_L) > 1 else ())

    @override
    def _n_dead(self, dead_N: Tensor, dead_F: Tensor | None, assignment: Assignment | None) -> int:
        return sum(self.batch.n_dead_L)


def chosen_dead(dead_N: Tensor, best: Candidates, is_chosen_BC: Tensor) -> Dead:
    return Dead(dead_N, best.chosen(is_chosen_BC[:, : best.ranked_BC.shape[1]]))
