"""Every private name of SAELens that this package uses, with its reason; checked on SAELens 6.54.12.

A test says which one a new version has lost, and that the table is complete. Most are methods of SAELens's trainers and
runners, which only a subclass can override.
"""

from sae_lens.training._interruption import InterruptedException

__all__ = ["OVERRIDDEN", "SUBSTITUTED", "InterruptedException"]

_SAE_TRAINER = "sae_lens.training.sae_trainer.SAETrainer"
_MULTI_SAE_TRAINER = "sae_lens.training.multi_sae_trainer.MultiSAETrainer"

# Overridden or called: class, method, reason.
OVERRIDDEN: dict[str, dict[str, str]] = {
    _SAE_TRAINER: {
        "_train_step": "SAELens's step makes dense [B, F] statistics and waits for the device",
        "_checkpoint_if_needed": "a full disk must not end a run",
        "_run_and_log_evals": "histograms of the routing are logged beside the evaluation",
        "_reset_running_sparsity_stats": "a captured step goes on writing to the same tensor",
        "_is_logging_step": "the dead mask is only built for steps that are logged",
        "_log_train_step": "called by the loop, as SAELens's own does",
    },
    _MULTI_SAE_TRAINER: {
        "_checkpoint_if_needed": "a full disk must not end a run",
        "_run_and_log_evals": "histograms of the routing are logged beside the evaluation",
        "_estimate_scaling_factors": "processes that divide SAEs draw the batches together",
        "_maybe_log_sparsity": "the last moment at which a signal makes a run save what it has trained",
        "_update_pbar": "progress without a terminal is written as sentences",
    },
    "sae_lens.multi_sae_training_runner.MultiSAETrainingRunner": {
        "_run_with_interruption_handling": "our trainer handles interruptions itself",
        "_save_final_outputs": "history.jsonl is saved beside each SAE",
    },
    "sae_lens.llm_sae_training_runner.LanguageModelSAETrainingRunner": {
        "_set_sae_metadata": "a transcoder has a hook for its output as well",
    },
    "sae_lens.synthetic.synthetic_sae_runner.SyntheticSAERunner": {
        "_save_outputs": "history.jsonl is saved beside the SAE",
    },
    "sae_lens.saes.sae.SAE": {
        "_setup_activation_normalization": "a copy or unpickled SAE needs closures of its own",
    },
}

# Names in SAELens's modules for which ``substitution.constructing`` puts a class of ours while a run lasts: its runners
# name what they construct, and offer no other place to choose it.
SUBSTITUTED: dict[str, set[str]] = {
    "sae_lens.llm_sae_training_runner": {"SAETrainer", "load_model"},
    "sae_lens.multi_sae_training_runner": {"MultiSAETrainer"},
    "sae_lens.synthetic.synthetic_sae_runner": {"SAETrainer"},
    "sae_lens.training.multi_sae_trainer": {"SAETrainer", "tqdm"},
    "sae_lens.training.activation_scaler": {"tqdm"},
}
