"""`python -m llava_triton.contract [FOLDER]`: writes the table of inputs and outputs into the
`config.pbtxt` files under FOLDER, by default `model_repository`."""

from __future__ import annotations

import sys
from pathlib import Path

from llava_triton.contract.configuration import configured

for path in sorted(Path(*sys.argv[1:] or ["model_repository"]).glob("*/config.pbtxt")):
    path.write_text(configured(path.read_text()))
