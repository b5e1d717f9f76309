"""What is computed: the SAEs, their configs, and what SAELens is told of them."""
