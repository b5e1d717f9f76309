"""The command line of ``python -m sae_lens_switch.train``: flags, files of settings, their values, the help."""
