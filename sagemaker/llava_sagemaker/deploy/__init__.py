"""From an empty AWS account to a chat, and back: a CloudFormation template (`template.yaml`), and a
small command line for what CloudFormation cannot do.

There is no state file. The stack is found by name and tag (`place.py`), and settings that a command
does not give are its parameters (`parameters.py`).
"""
