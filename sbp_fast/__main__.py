"""`python -m sbp_fast`, and what `torchrun -m sbp_fast` starts."""

from sbp_fast.cli import main

main()
