"""What happens on the devices: the model is built on the meta device, then each rank reads and shards its own slices."""
