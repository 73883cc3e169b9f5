"""The command `python -m mmcot.predict`."""

from mmcot.prediction.predictor import main

if __name__ == "__main__":
    main()
