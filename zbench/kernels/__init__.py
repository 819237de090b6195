"""Hand-written operators, each beside the torch reference that defines it."""
