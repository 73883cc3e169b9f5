"""The command `python -m mmcot.train`."""

from mmcot.training.run import main

if __name__ == "__main__":
    main()
