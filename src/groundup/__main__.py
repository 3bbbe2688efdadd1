"""`python -m groundup` is the same program as `groundup`."""

from groundup.cli import main

raise SystemExit(main())
