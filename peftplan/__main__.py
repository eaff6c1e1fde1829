"""`python -m peftplan`: the command line where its script is not on the path."""

from peftplan.cli import main

main()
