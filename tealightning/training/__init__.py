"""The training step: advantages, loss, micro-batches, weights of the policy."""
