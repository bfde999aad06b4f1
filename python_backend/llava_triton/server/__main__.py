"""`python -m llava_triton.server REPOSITORY`: serves a model repository until it is told to end."""

from __future__ import annotations

import sys

from llava_triton.server.triton_server import main

sys.exit(main())
