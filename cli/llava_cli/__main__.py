"""`python -m llava_cli`."""

from llava_cli.app import main

main()
