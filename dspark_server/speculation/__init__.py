"""Everything that makes decoding faster and may not change its law (DSpark §3, §5.2).

`sampling` turns logits into the distribution a request asked for and owns all randomness; `acceptance` is the
lossless test. Both are mathematics on tensors: no engine, no model, no state but the noise they are handed.
"""
