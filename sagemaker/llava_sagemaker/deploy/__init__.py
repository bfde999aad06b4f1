"""From an empty AWS account to a chat, and back: boto3 and a small command line.

There is no state file. What exists is found in AWS by name and tag (`place.py`), and settings that
a command does not give are read from what runs (`settings.py`).
"""
