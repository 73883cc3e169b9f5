"""The command `python -m mmcot.convert`."""

from mmcot.hub.original import main

if __name__ == "__main__":
    main()
