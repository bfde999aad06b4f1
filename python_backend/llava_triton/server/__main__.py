"""`python -m llava_triton.server --repository REPOSITORY`: serves it until it is told to stop."""

from __future__ import annotations

import sys

from llava_triton.server.triton_server import main

sys.exit(main())
