"""`python -m oxjax`."""

from oxjax.cli import main

main()
