"""From what clients send as a picture to image features."""
