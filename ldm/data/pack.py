"""As `python -m ldm pack`, by its name of before."""

from ldm.command.pack import main

if __name__ == "__main__":
    raise SystemExit(main())
