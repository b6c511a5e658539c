"""Encodes a data set ahead of time, as `ldm precompute` does:  python precompute.py model=RUN data=shards out=DIR"""

from ldm.command.precompute import main

if __name__ == "__main__":
    main()
