"""``python -m polyspan.cli`` is the same as ``polyspan``."""

from polyspan.cli import main

main()
