"""`python -m coldmerge` is `coldmerge`."""

from coldmerge.cli.app import main

main()
