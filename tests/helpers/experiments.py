"""What the tests of the experiments share: the columns of results.csv that are measured."""

RESULTS = [
    *("l0", "mse", "fvu", "final_loss", "ce_recovered", "dead_latents", "load_max", "load_min"),
    *("flops_per_activation", "steps", "tokens"),
]
