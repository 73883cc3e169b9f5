"""Train, predict, score and export what a recipe describes. The same command again goes on with an interrupted run.

python train.py --config configs/demo.yaml
accelerate launch train.py --config configs/scienceqa_base.yaml --dataset ../shared/scienceqa
"""

from mmcot.train import main

if __name__ == "__main__":
    main()
