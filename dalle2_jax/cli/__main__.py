"""python -m dalle2_jax.cli"""

import sys

from dalle2_jax.cli import main

sys.exit(main())
