"""The latents of one process: a part of an SAE whose dictionary is divided, and what all processes have of it."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any, Self

import torch
from sae_lens.registry import get_sae_training_class
from sae_lens_switch_kernels import Reconstruction
from torch import Tensor, nn
from typing_extensions import override

from sae_lens_switch.common.seeds import mixed_seed
from sae_lens_switch.common.types import AnyTrainingSAE
from sae_lens_switch.parallel.ranks import Ranks
from sae_lens_switch.saes.sparse_sae import SparseTrainingSAE
from sae_lens_switch.saes.step import DeadLatents

# Which dimension of a weight counts latents; all others, and buffers, are the same on every process.
LATENT_DIM = {"W_enc": 1, "W_dec": 0, "b_enc": 0, "threshold": 0}
# Fields of a config that change when the scaling of activations is folded into the weights.
_FOLDED = ("normalize_activations", "rescale_acts_by_decoder_norm")


class Shard(SparseTrainingSAE, ABC):
    """F / P latents of an SAE, as trained by one process of P, with everything that does not belong to a latent.

    Losses are this process's part of the whole batch's; their sum over the processes is the loss. So are the gradients
    of what the processes share. ``cfg`` is that of the part, ``whole`` that of the SAE.

    Args:
        whole: The config of the SAE.
        ranks: Who owns which latents.

    Attributes:
        batch: What all know of the step's batch, or of the part of it that is computed: a RoutedBatch or a RowBatch.
    """

    batch: Any

    def __init__(self, whole: Any, ranks: Ranks) -> None:
        self.whole, self.ranks = replace(whole, device=str(ranks.device)), ranks
        super().__init__(self._part_of(self.whole, ranks.row_size))

    @classmethod
    @abstractmethod
    def _part_of(cls, whole: Any, P: int) -> Any:
        """The config of one of P parts. Raises ValueError if the SAE cannot be divided so."""

    @property
    @abstractmethod
    def _block_width(self) -> int:
        """How many latents are initialised at a time, whatever the number of parts."""

    @abstractmethod
    def _new_block(self) -> SparseTrainingSAE:
        """A new SAE of so many latents, on the CPU."""

    def _new_of(self, **fields: Any) -> AnyTrainingSAE:
        """A new SAE like the whole, but for these fields of its config, on the CPU."""
        return get_sae_training_class(self.whole.architecture())[0](replace(self.whole, **fields, device="cpu"))

    def _draw_shared(self) -> None:
        """Initialise what the processes share and is random."""

    def _set_fresh(self, value: bool) -> None:
        """Whether the first step is to initialise parameters."""

    @property
    def n_tokens(self) -> int:
        """Tokens of the batch, of all processes."""
        return self.batch.n_tokens

    @classmethod
    def of(cls, sae: AnyTrainingSAE, ranks: Ranks) -> Self:
        """This process's part of an SAE that all processes have.

        Where their weights differ, those of the first process that holds them count.
        """
        shard = cls(sae.cfg, ranks)
        with torch.no_grad():
            for name, p in shard.named_parameters():
                whole = sae.get_parameter(name)
                p.copy_(shard.part(name, whole))
                p.requires_grad = whole.requires_grad
            for name, buffer in shard.named_buffers():
                buffer.copy_(sae.get_buffer(name))
        for p in shard.divided_parameters():
            ranks.broadcast_over_data_(p.data if p.is_contiguous() else p.data.T, "latents")
        shard.copy_shared_from_first()
        shard._set_fresh(ranks.first_says(isinstance(sae, SparseTrainingSAE) and sae.is_fresh))
        return shard

    @classmethod
    @torch.no_grad()
    def fresh(cls, whole: Any, ranks: Ranks) -> Self:
        """This process's part of a new SAE, initialised block by block: the same for any number of processes."""
        seed = ranks.first_says(int(torch.randint(2**62, ())))
        shard = cls(whole, ranks)
        first, end, M = shard.first_latent, shard.first_latent + shard.cfg.d_sae, shard._block_width
        for block in range(first // M, -(-end // M)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(mixed_seed(seed, block))
                new = shard._new_block()
            start, stop = max(block * M, first), min((block + 1) * M, end)
            for name, p in shard.named_parameters():
                dim = LATENT_DIM.get(name)
                if dim is not None:
                    source = new.get_parameter(name).narrow(dim, start - block * M, stop - start)
                    p.narrow(dim, start - first, stop - start).copy_(source)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mixed_seed(seed, shard.whole.d_sae))  # which is no block's number
            shard._draw_shared()
        shard.copy_shared_from_first()
        shard._set_fresh(True)
        return shard

    @property
    def first_latent(self) -> int:
        """Of this process, among all."""
        return self.ranks.row_rank * self.cfg.d_sae

    def gathered(self) -> AnyTrainingSAE:
        """The whole SAE, in the memory of every process; random numbers stay as they are."""
        return self.gathered_into(self.new_whole())

    def new_whole(self) -> AnyTrainingSAE:
        """A new SAE as large as the whole, where this process computes. The others need not take part."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            return get_sae_training_class(self.whole.architecture())[0](self.config_of_whole())

    @torch.no_grad()
    def gathered_into(self, sae: AnyTrainingSAE) -> AnyTrainingSAE:
        """``sae``, as ``new_whole`` makes it, with the weights of all processes."""
        for name, p in self.named_parameters():
            dim = LATENT_DIM.get(name)
            whole = p if dim is None else self.gathered_latents(p.movedim(dim, 0)).movedim(0, dim)
            sae.get_parameter(name).copy_(whole)
        for name, buffer in self.named_buffers():
            sae.get_buffer(name).copy_(buffer)
        return sae

    def config_of_whole(self) -> Any:
        """``whole``, with what folding has changed."""
        return replace(self.whole, **{name: vars(self.cfg)[name] for name in _FOLDED if name in vars(self.cfg)})

    def gathered_latents(self, t: Tensor) -> Tensor:
        """What this process has of its latents, [F / P, ...], for all latents [F, ...], on every process."""
        return self.ranks.gather_row(t, "latents").flatten(0, 1)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of the parameter ``name``."""
        return whole.narrow(LATENT_DIM[name], self.first_latent, self.cfg.d_sae) if name in LATENT_DIM else whole

    def divided_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name in LATENT_DIM]

    def shared_parameters(self) -> list[nn.Parameter]:
        return [p for name, p in self.named_parameters() if name not in LATENT_DIM]

    def copy_shared_from_first(self) -> None:
        for t in (*self.shared_parameters(), *self.buffers()):
            self.ranks.broadcast_(t.data, "what all share")

    @override
    def _batch_share(self, x_BD: Tensor) -> float:
        """What the mean of these tokens counts for in that of the whole batch."""
        return len(x_BD) / self.n_tokens

    @override
    def _aux_loss(
        self, x_BD: Tensor, sae_out_BD: Tensor, result: Reconstruction, dead: DeadLatents, n_dead: Tensor | int
    ) -> Tensor:
        return super()._aux_loss(x_BD, sae_out_BD, result, dead, n_dead) * self._batch_share(x_BD)
