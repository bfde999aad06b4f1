"""The language model on its device: a step in, the next tokens out."""
