"""Run the command line as `python -m lightning_netsim`."""

from __future__ import annotations

from lightning_netsim.cli import main

if __name__ == "__main__":
    main()
