"""The machine: which device, its peaks on paper, its measured ceilings, and what else could change a result."""
