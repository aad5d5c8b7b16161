"""The parts of decoder layers. Each part reads its own tensors and holds this rank's share of them."""
