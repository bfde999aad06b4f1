"""The models that Triton serves: its requests and responses become turns and pieces of answers.

`model_repository/*/1/model.py` hand Triton's `triton_python_backend_utils`, which exists only in
its processes, to a class from here. Triton calls `initialize`, `execute` and `finalize`.
"""
