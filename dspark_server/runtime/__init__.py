"""What a step runs on: device and dtype, packed weights, KV pool tensors, the batch layout."""
