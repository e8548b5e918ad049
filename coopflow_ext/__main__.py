"""``python -m coopflow_ext`` is the command ``coopflow``."""

import sys

from coopflow_ext.cli import main

sys.exit(main())
