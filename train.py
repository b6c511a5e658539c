"""Trains one stage, as `ldm train` does:  python train.py experiment=emoji/text optimizer.lr=3e-4 resume=auto"""

from ldm.command.train import main

if __name__ == "__main__":
    main()
