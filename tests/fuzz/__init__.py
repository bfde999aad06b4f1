"""Every parser of what clients send, under inputs that nobody would write.

`make fuzz` gives them a million, guided by coverage; `tests/sagemaker/test_fuzz.py` a few thousand.
"""
