"""Speculative decoding: it makes decoding faster without changing the output distribution (DSpark §3, §5.2).

`sampling` turns logits into the distribution that a request asked for and owns all randomness; `acceptance` is the
lossless test. Both are pure functions of tensors: no engine, no model, no state but the noise that is passed in.
"""
