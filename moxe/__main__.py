"""`python -m moxe` is `moxe`."""

from moxe.cli import main

raise SystemExit(main())
