import sys

from groundup.env.cli import main

sys.exit(main())
