"""What training will cost: a step on one machine, and a run on a cluster."""
