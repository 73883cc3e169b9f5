"""The command `python -m mmcot.evaluate`."""

from mmcot.evaluation.predictions import main

if __name__ == "__main__":
    main()
