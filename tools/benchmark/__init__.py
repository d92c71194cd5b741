"""Speed beside peers and beside the machine's own limit: same weights, same batches, same trainable set, one run."""
