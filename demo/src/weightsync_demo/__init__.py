"""weightsync on one bare machine, without a cluster: what the demo and the fast tests run on."""
