"""`python -m vipo` is `vipo`."""

from .cli import main

main()
