"""From what was said to tokens, and back."""
