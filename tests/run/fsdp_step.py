"""One training step with parameters spread over two processes by FSDP, run by test_distributed.

torchrun --nproc_per_node 2 tests/run/fsdp_step.py <model folder> <adapter folder to write>
"""

import sys
from pathlib import Path

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sqft_export.adapters.files import Base, save_adapter
from sqft_export.adapters.loading import add_adapters, load_compressed
from sqft_export.machine.launcher import process_rank
from sqft_export.model.checkpoint import Checkpoint
from sqft_export.model.storage import GridWriter, mask_writer
from sqft_export.numerics.affine import fit_grid
from sqft_export.numerics.masks import drop_share, mask_to_bits


def write_masks_and_grids(model: Path, folder: Path) -> None:
    checkpoint = Checkpoint(model)
    with mask_writer(folder) as masks, GridWriter(folder) as grids:
        for name in checkpoint.linears:
            weight = checkpoint.tensor(f"{name}.weight").float()
            masks.add(name, mask_to_bits(drop_share(weight.abs(), 0.5)))
            grids.add(name, fit_grid(weight, 4, 32, True))


def build(model: Path, folder: Path) -> torch.nn.Module:
    adapted = add_adapters(
        load_compressed(Base(model, folder, folder), torch.float32),
        ("q_proj", "k_proj", "up_proj"),
        8,
        16.0,
        0.0,
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return adapted.train()


def step(model: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients after one step of SGD."""
    ids = torch.arange(48).reshape(2, 24) % 40
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients = {
        n: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad.clone()
        for n, p in trained.items()
    }
    torch.optim.SGD(list(trained.values()), lr=0.1).step()
    return loss.detach(), gradients


def main() -> None:
    model, adapter = Path(sys.argv[1]), Path(sys.argv[2])
    distributed.init_process_group("gloo")
    if process_rank() == 0:
        write_masks_and_grids(model, adapter.parent)
    distributed.barrier()
    whole, sharded = build(model, adapter.parent), build(model, adapter.parent)
    mesh = init_device_mesh("cpu", (2,))
    for block in sharded.base_model.model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    stored = [p for n, p in sharded.named_parameters() if n.endswith("base_layer.weight")]
    assert all(p.to_local().numel() * 2 == p.numel() for p in stored)  # half of each weight here
    loss, gradients = step(whole)
    sharded_loss, sharded_gradients = step(sharded)
    torch.testing.assert_close(sharded_loss, loss)
    assert gradients.keys() == sharded_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(sharded_gradients[name], gradient, msg=name)
    save_adapter(sharded, adapter)
    if process_rank() == 0:
        save_adapter(whole, adapter.with_name("whole"))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
