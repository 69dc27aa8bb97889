"""AutoDrop with DistributedDataParallel: a convolutional network on handwritten digits.

torchrun --standalone --nproc-per-node 2 examples/ddp.py --checkpoint /tmp/ddp
torchrun --standalone --nproc-per-node 2 examples/ddp.py --checkpoint /tmp/ddp --resume --steps 900
"""

import argparse
import itertools
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from autodrop_ext import AutoDrop


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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=450, help="optimizer steps in all")
    parser.add_argument("--checkpoint", metavar="DIR", help="written at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint DIR")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    torch.manual_seed(0)

    data = digits()
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data), drop_last=True)
    model = DistributedDataParallel(network().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.04, momentum=0.9)
    scheduler = AutoDrop(optimizer, window=4, factor=0.8, on_drop=show)  # the one line

    def state():
        parameters, moments = get_state_dict(model, optimizer)
        return {"model": parameters, "optimizer": moments, "scheduler": scheduler}

    if args.resume:
        saved = state()
        dcp.load(saved, checkpoint_id=args.checkpoint)
        loaded = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
        set_state_dict(model, optimizer, **loaded)
    begin = scheduler.last_epoch  # how often it has been stepped
    for step, batch in zip(range(begin, args.steps), batches(loader, begin), strict=False):
        images, labels = (part.to(device) for part in batch)
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if dist.get_rank() == 0 and step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if args.checkpoint:
        dcp.save(state(), checkpoint_id=args.checkpoint)
    lr, drops = scheduler.get_last_lr()[0], scheduler.num_drops
    print(f"rank {dist.get_rank()} ended at step {scheduler.last_epoch}: lr {lr}, {drops} drops")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
