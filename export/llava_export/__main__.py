"""`python -m llava_export`."""

import sys

from llava_export.cli import main

sys.exit(main())
