"""Train, predict, score and export what a recipe describes. The same command again goes on with an interrupted run.

python train.py --config configs/demo/two_stages.yaml
accelerate launch train.py --config configs/scienceqa/base.yaml --dataset ../shared/scienceqa
"""

from mmcot.train import main

if __name__ == "__main__":
    main()
