"""As `python -m ldm doctor`, by its name of before."""

from ldm.command.doctor import main

if __name__ == "__main__":
    raise SystemExit(main())
