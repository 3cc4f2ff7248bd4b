"""Train the teacher, FeatherFace V1 (or any other config, without distillation by default).

    python train_v1.py --config configs/v1.yaml --out runs/v1
    python train_v1.py --config configs/v1_compact.yaml --opts train.epochs=100 --out runs/v1_compact --resume
    torchrun --nproc-per-node 4 train_v1.py --out runs/v1

The learning-rate schedule, checkpoints and logs: see utils/trainer.py and utils/engine.py.
"""

import sys

from utils.train_cli import main

if __name__ == "__main__":
    sys.exit(main("train_v1.py", __doc__.splitlines()[0], "configs/v1.yaml"))
