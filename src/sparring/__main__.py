"""`python -m sparring` is the command `sparring`."""

from sparring.app.cli import main

main()
