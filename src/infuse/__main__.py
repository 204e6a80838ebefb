"""`python -m infuse`."""

from __future__ import annotations

from infuse.cli import main

raise SystemExit(main())
