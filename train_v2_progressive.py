"""Train the student, FeatherFace V2 Ultra, by progressive resizing and progressive distillation.

    python train_v2_progressive.py --config configs/v2_ultra.yaml --out runs/v2_ultra
    python train_v2_progressive.py --opts distill.teachers=[v1] --out runs/x --max-minutes 60 --resume
    torchrun --nproc-per-node 4 train_v2_progressive.py --out runs/v2_ultra

Teachers, stages, temperature and weight of the distillation are in the config; see layers/distillation.py.
"""

import sys

from utils.train_cli import main

if __name__ == "__main__":
    sys.exit(main("train_v2_progressive.py", __doc__.splitlines()[0], "configs/v2_ultra.yaml"))
