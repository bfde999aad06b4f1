"""From what was said to tokens (`renderer.py`), and back (`detokenizer.py`)."""
