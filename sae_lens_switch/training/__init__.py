"""How it is trained: the trainer, its optimisers, checkpoints and runners."""
