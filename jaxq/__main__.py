"""`python -m jaxq`."""

from jaxq.cli import main

main()
