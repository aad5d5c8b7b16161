"""The parts that run a step: device and dtype, packed weights, KV pool tensors, the batch layout."""
