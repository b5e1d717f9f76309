"""What holds a process's part of an SAE or a transcoder, by its config."""

from sae_lens_switch.parallel.batch_latent_shard import BatchLatentShard
from sae_lens_switch.parallel.expert_shard import ExpertShard
from sae_lens_switch.parallel.latent_shard import LatentShard
from sae_lens_switch.parallel.matryoshka_shard import MatryoshkaLatentShard
from sae_lens_switch.parallel.pair_shard import PairShard
from sae_lens_switch.saes.config import SwitchTrainingSAEConfig
from sae_lens_switch.saes.sparse_topk_transcoder import SparseBatchTopKTrainingTranscoder, SparseTopKTrainingTranscoder
from sae_lens_switch.saes.switch_transcoder import SwitchTrainingTranscoder
from sae_lens_switch.saes.transcoder_fields import TranscoderFields


class TranscoderExpertShard(ExpertShard, SwitchTrainingTranscoder):
    """Tokens are sent with their targets, and the owner of a token's expert can do the whole step."""


class TranscoderPairShard(PairShard, SwitchTrainingTranscoder):
    """Targets stay at home."""


class TranscoderLatentShard(LatentShard, SparseTopKTrainingTranscoder):
    """Targets stay at home."""


class TranscoderBatchLatentShard(BatchLatentShard, SparseBatchTopKTrainingTranscoder):
    """Targets stay at home."""


# What an expert's owner can do a whole step with. Of two active experts the best latents must be found among those of
# both; a bias and the z-loss are about tokens that it has not received.
_BY_OWNER = {"n_active_experts": 1, "load_balancing": "loss", "router_z_loss_coefficient": 0}


def expert_shard_class(whole: SwitchTrainingSAEConfig) -> type[ExpertShard]:
    """What trains a process's experts: an ``ExpertShard``, which sends least, wherever it can."""
    fields = vars(whole)
    by_owner = all(fields[name] == value for name, value in _BY_OWNER.items())
    if isinstance(whole, TranscoderFields):
        return TranscoderExpertShard if by_owner else TranscoderPairShard
    return ExpertShard if by_owner else PairShard


# What divides latents, by architecture.
LATENT_SHARDS: dict[str, type[LatentShard]] = {
    "sparse_topk": LatentShard,
    "sparse_batchtopk": BatchLatentShard,
    "sparse_matryoshka_batchtopk": MatryoshkaLatentShard,
    "sparse_topk_transcoder": TranscoderLatentShard,
    "sparse_batchtopk_transcoder": TranscoderBatchLatentShard,
}
# Their choice is over the batch of all processes, also where each has all latents.
OVER_BATCH = tuple(name for name, shard in LATENT_SHARDS.items() if issubclass(shard, BatchLatentShard))
