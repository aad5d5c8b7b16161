"""dspark-server: lossless speculative decoding, scheduled by confidence and load (DSpark, 2026)."""

__version__ = "0.1.0"
