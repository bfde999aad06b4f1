"""What clients, models and adapter agree on. Imports neither torch, nor Triton, nor transformers.

`python -m llava_triton.contract` writes it into the files under `model_repository/`.
"""
