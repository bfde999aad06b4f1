"""`python -m llava_triton.server --repository REPOSITORY`: serves it until it is told to stop."""

from __future__ import annotations

import sys

from llava_triton.server.foreground import main

sys.exit(main())
