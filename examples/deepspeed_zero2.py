"""AutoDrop with DeepSpeed ZeRO-2: a convolutional network on handwritten digits.

    torchrun --standalone --nproc-per-node 2 examples/deepspeed_zero2.py --checkpoint /tmp/zero2

A resumed run needs as many processes as the one before.
"""

import argparse
import itertools

import deepspeed
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from autodrop_ext import AutoDrop

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "SGD", "params": {"lr": 0.04, "momentum": 0.9}},
    "zero_allow_untested_optimizer": True,
}


def digits():
    """1,797 images [1, 8, 8] in [0, 1] and their labels, installed with scikit-learn."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return TensorDataset(images[:, None], torch.tensor(data.target))


def network():
    convolutions = [
        nn.Conv2d(1, 16, 3, padding=1),
        nn.Tanh(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3),
    ]
    return nn.Sequential(*convolutions, nn.Tanh(), nn.Flatten(), nn.Linear(32 * 4, 10))


def batches(loader, step):
    """Batches without end from a step on, so that a resumed run goes on in the data too."""
    while True:
        epoch, seen = divmod(step, len(loader))
        loader.sampler.set_epoch(epoch)
        for batch in itertools.islice(loader, seen, None):
            yield batch
            step += 1


def show(decision):
    if dist.get_rank() == 0:
        print(f"step {decision.step}: angle {decision.angle:.1f}, lr down to {decision.lr[0]:.4f}")


def autodrop(optimizer):
    return AutoDrop(optimizer, window=4, factor=0.8, on_drop=show)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=450, help="optimizer steps in all")
    parser.add_argument("--checkpoint", metavar="DIR", help="written at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint DIR")

    if not torch.cuda.is_available():  # there, collectives through shared memory would be compiled
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.manual_seed(0)

    data = digits()
    size = CONFIG["train_micro_batch_size_per_gpu"]
    loader = DataLoader(data, batch_size=size, sampler=DistributedSampler(data), drop_last=True)
    model = network()
    # The one line is lr_scheduler=: the engine steps it after every optimizer step, and saves it.
    engine, _, _, scheduler = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), lr_scheduler=autodrop, config=CONFIG
    )
    if args.resume:
        engine.load_checkpoint(args.checkpoint)
    begin = engine.global_steps
    for step, batch in zip(range(begin, args.steps), batches(loader, begin), strict=False):
        images, labels = (part.to(engine.device) for part in batch)
        loss = nn.functional.cross_entropy(engine(images), labels)
        engine.backward(loss)
        engine.step()
        if dist.get_rank() == 0 and step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if args.checkpoint:
        engine.save_checkpoint(args.checkpoint)
    lr, drops = scheduler.get_last_lr()[0], scheduler.num_drops
    print(f"rank {dist.get_rank()} ended at step {scheduler.last_epoch}: lr {lr}, {drops} drops")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
