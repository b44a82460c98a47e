"""The rows without a method: what a segmentation network reaches with supervised training alone.

    python baseline.py                                   (source_only, the floor; 1 minute)

    python baseline.py --row oracle                      (the ceiling: all labels of the target)

The network, its recipe and the number of its updates are those of every other row.
"""

from dataclasses import dataclass
from typing import Literal

import common
import datasets
from common import Result
from datasets import UserError

Row = Literal["source_only", "random_aug", "color_transfer", "few_label", "oracle"]


@dataclass(frozen=True)
class Args(common.Args):
    row: Row = "source_only"
    """source_only: trained on the source as it is. random_aug: each source image as it is, blurred,
    colour-jittered or RGB-shifted at random. color_transfer: each source image gets the mean and
    the covariance of RGB of a random training photo. few_label: source_only, then fine-tuned on the
    labelled target photos. oracle: trained on the target's training part with all its labels."""
    finetune: float = 0.5
    """few_label: the share of --steps that is spent on the labelled photos."""
    epochs: int = 400
    """few_label: most passes over the labelled photos; what they leave is source training."""
    finetune_lr: float = 0.5
    """few_label: initial learning rate of the fine-tuning, as a multiple of --lr."""


def run(args: Args) -> Result:
    """Trains a baseline: the segmentation network without any adaptation method."""
    few_label, oracle = args.row == "few_label", args.row == "oracle"
    if not 0 < args.finetune <= 1:
        raise UserError(f"--finetune {args.finetune}: expected above 0 and at most 1")
    run = common.Run(args, args.row, stages=2 if few_label else 1)
    if run.result:
        return run.result
    args = run.args
    labelled = datasets.load(args, "target_few") if few_label else ()
    run.begin()
    net = run.network()

    # Step 1: training on the source. A checkpoint given by --init has had it already.
    finetune_steps = 0
    if few_label:
        finetune_steps = common.finetune_steps(args, args.finetune, args.epochs)
    source_steps = 0 if args.checkpoint else max(0, args.steps - finetune_steps)
    translate = augment = common.identity
    if args.row == "random_aug":
        augment = common.random_augmentation
    elif args.row == "color_transfer":
        translate = common.photo_style(datasets.load(args, "target_unlabelled"))

    if source_steps > 0 and not oracle:
        source = datasets.load(args, "source")
        common.train(run, net, source, source_steps, "source", translate, augment)

    # Step 2: training on labelled photos: all of the training part, or a few.
    if oracle:
        labelled, finetune_steps, source_steps = datasets.load(args, "target_train"), args.steps, 0
        common.train(run, net, labelled, args.steps, "target")
    elif few_label:
        lr = args.lr * args.finetune_lr
        common.train(run, net, labelled, finetune_steps, "few", lr=lr)
    return run.finish(net, target_labels=len(labelled), steps=source_steps + finetune_steps)


if __name__ == "__main__":
    common.main(Args, run, __doc__)
