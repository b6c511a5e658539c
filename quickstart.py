"""The whole road in minutes, as `ldm quickstart` goes it:  python quickstart.py [MINUTES]"""

from ldm.command.quickstart import main

if __name__ == "__main__":
    main()
