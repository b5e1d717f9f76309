"""Adam with the decoder's constraint, dense and for the active rows only."""
