"""``python -m lp_patch`` is ``lp-patch``."""

from .cli import main

raise SystemExit(main())
