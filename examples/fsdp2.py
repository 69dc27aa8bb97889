"""AutoDrop with FSDP2: a byte-level transformer on the source of Python's standard library.

A checkpoint may be taken in the middle of a window and resumed on another number of processes:

    run="torchrun --standalone --nproc-per-node"
    $run 2 examples/fsdp2.py --checkpoint /tmp/fsdp2
    $run 1 examples/fsdp2.py --checkpoint /tmp/fsdp2 --resume --steps 300
"""

import argparse
import itertools
import os
import pathlib
import sysconfig

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

from autodrop_ext import AutoDrop

CONTEXT = 64  # bytes


class Transformer(nn.Module):
    """Text [batch, CONTEXT + 1] to the mean cross entropy of each next byte, in nats."""

    def __init__(self, width=64, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
        layers = [nn.TransformerEncoderLayer(width, 4, 256, **options) for _ in range(num_layers)]
        self.layers = nn.ModuleList(layers)
        self.logits = nn.Linear(width, 256)

    def forward(self, text):
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=text.device)
        x = self.embedding(text[:, :-1]) + self.position
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.logits(x).flatten(0, 1), text[:, 1:].flatten())


def library():
    """Pieces of CONTEXT + 1 bytes of the standard library's modules."""
    files = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = torch.tensor(list(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return text.unfold(0, CONTEXT + 1, CONTEXT)


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
        print(f"step {decision.step}: angle {decision.angle:.1f}, lr down to {decision.lr[0]:.5f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps in all")
    parser.add_argument("--checkpoint", metavar="DIR", help="written at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint DIR")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    torch.manual_seed(0)

    data = library()
    loader = DataLoader(data, batch_size=8, sampler=DistributedSampler(data), drop_last=True)
    model = Transformer().to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
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
    for step, text in zip(range(begin, args.steps), batches(loader, begin), strict=False):
        loss = model(text.to(device).long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if dist.get_rank() == 0 and step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    if args.checkpoint:
        dcp.save(state(), checkpoint_id=args.checkpoint)
    lr, drops = scheduler.get_last_lr()[0], scheduler.num_drops
    print(f"rank {dist.get_rank()} ended at step {scheduler.last_epoch}: lr {lr}, {drops} drops")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
