"""The command `python -m mmcot.probes`."""

from mmcot.analysis.probes import main

if __name__ == "__main__":
    main()
