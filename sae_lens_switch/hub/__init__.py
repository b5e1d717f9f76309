"""SAEs on the Hugging Face Hub: uploaded with a model card, downloaded and verified."""

from sae_lens_switch.hub.download import verified_loader
from sae_lens_switch.hub.upload import upload_saes_to_huggingface

__all__ = ["upload_saes_to_huggingface", "verified_loader"]
