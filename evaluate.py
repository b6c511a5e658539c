"""Measures a model, as `ldm evaluate` does:  python evaluate.py model=RUN metric=[text_match,reconstruction] out=DIR"""

from ldm.command.evaluate import main

if __name__ == "__main__":
    main()
