"""`python -m zbench`, which is what `torchrun -m zbench` runs."""

from zbench.cli import main

main(prog_name="zbench")
