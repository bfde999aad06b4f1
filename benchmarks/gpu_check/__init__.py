"""`make gpu-check`, what only a GPU can show: `__main__.py` is the command, a module a stage."""
