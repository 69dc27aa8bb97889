"""AutoDrop with FSDP2 and tensor parallelism on a two-dimensional mesh.

torchrun --standalone --nproc-per-node 2 examples/fsdp2_tensor_parallel.py
torchrun --standalone --nproc-per-node 2 examples/fsdp2_tensor_parallel.py --tensor-parallel 1
torchrun --standalone --nproc-per-node 4 examples/fsdp2_tensor_parallel.py
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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.data import DataLoader, DistributedSampler

from autodrop_ext import AutoDrop

CONTEXT = 64  # bytes


class Block(nn.Module):
    """A layer of a transformer; between the column-wise and row-wise cuts a rank has its heads."""

    def __init__(self, width, head_width=16):
        super().__init__()
        self.head_width = head_width
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def heads(self, x):
        return x.unflatten(2, (-1, self.head_width)).transpose(1, 2)

    def forward(self, x):
        y = self.norms[0](x)
        qkv = (self.heads(project(y)) for project in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


class Transformer(nn.Module):
    """Text [batch, CONTEXT + 1] to the mean cross entropy of each next byte, in nats."""

    def __init__(self, width=64, num_layers=2):
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, width))
        self.layers = nn.Sequential(*(Block(width) for _ in range(num_layers)))
        self.logits = nn.Linear(width, 256)

    def forward(self, text):
        logits = self.logits(self.layers(self.embedding(text[:, :-1]) + self.position))
        return nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


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
    parser.add_argument("--tensor-parallel", type=int, default=2, help="ranks that share a layer")
    parser.add_argument("--checkpoint", metavar="DIR", help="written at the end")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args()
    if args.resume and not args.checkpoint:
        parser.error("--resume needs --checkpoint DIR")
    if int(os.environ["WORLD_SIZE"]) % args.tensor_parallel:
        parser.error("--tensor-parallel: expected a divisor of the number of processes")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.get_device_module(device).set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()  # gloo for tensors on the CPU, NCCL for those on GPUs
    torch.manual_seed(0)
    shape = (dist.get_world_size() // args.tensor_parallel, args.tensor_parallel)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "tensor"))

    data = library()
    sampler = DistributedSampler(data, mesh["data"].size(), mesh["data"].get_local_rank())
    loader = DataLoader(data, batch_size=8, sampler=sampler, drop_last=True)
    model = Transformer().to(device)
    cut = dict.fromkeys(("query", "key", "value", "up"), ColwiseParallel())
    cut |= dict.fromkeys(("out", "down"), RowwiseParallel())
    for layer in model.layers:
        parallelize_module(layer, mesh["tensor"], cut)
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh["data"])
    # Norms and embeddings lie on mesh["data"] alone; foreach, the default on GPUs, takes DTensors
    # of different meshes together only in newer torch than 2.6.
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003, foreach=False)
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
