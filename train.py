"""Trains, predicts, scores and exports the system that a recipe describes. The same command resumes an interrupted run.

python train.py --config configs/demo/two_stages.yaml
accelerate launch train.py --config configs/scienceqa/base.yaml --dataset ../shared/scienceqa
"""

from mmcot.train import main

if __name__ == "__main__":
    main()
