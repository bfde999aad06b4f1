"""What clients, models and adapter agree on. Imports neither torch, nor Triton, nor transformers.

A new output of the models is a field of `delta.Delta`, which `engine.turn.RunningTurn` fills in; a
new input is one of `models`.
`python -m llava_triton.contract` writes them into the files under `model_repository/`.
"""
