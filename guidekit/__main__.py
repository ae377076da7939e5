"""`python -m guidekit` is the command `guidekit`."""

from guidekit.cli.main import main

main(prog_name="guidekit")
