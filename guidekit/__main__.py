"""`python -m guidekit` is the command `guidekit`."""

from guidekit.cli import main

main(prog_name="guidekit")
