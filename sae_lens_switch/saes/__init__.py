"""What is computed: the SAEs, their configs and files, and their registration with SAELens."""
