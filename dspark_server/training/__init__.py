"""Training a drafter for a frozen target (DSpark §3.3): corpus -> features -> model -> loss -> train."""
