"""The command `python -m mmcot.features`."""

from mmcot.pictures.featurizer import main

if __name__ == "__main__":
    main()
