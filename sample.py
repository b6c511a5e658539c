"""Draws pictures, as `ldm sample` does:  python sample.py model=runs/quickstart/diffusion prompt='[red apple,fox]' out=samples"""

from ldm.command.sample import main

if __name__ == "__main__":
    main()
