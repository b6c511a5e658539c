"""As `python -m ldm average`, by its name of before."""

from ldm.training.average import main

if __name__ == "__main__":
    main()
