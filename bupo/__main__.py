import sys

from bupo.cli import main

sys.exit(main())
