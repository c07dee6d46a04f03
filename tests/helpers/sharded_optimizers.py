"""One rank of two: optimizers on weights that FSDP2 shards make the steps that they make on whole ones."""

from functools import partial

import torch
import torch.distributed as dist
from module_fixtures import tiny_llama
from schedule_free import SGDScheduleFree
from torch.distributed.device_mesh import init_device_mesh

from tealightning.errors import UserError
from tealightning.training.optimizers import MuonWithAdamW, build_optimizer, switch_weights, try_optimizer
from tealightning.training.policy_weights import shard, whole


def after_three_steps(make, mesh=None):
    model = tiny_llama()
    if mesh is not None:
        shard(model, mesh)
    optimizer = build_optimizer(make, model)
    switch_weights(optimizer, "train")
    ids = torch.arange(24).view(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    switch_weights(optimizer, "eval")
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    start = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    # Muon's products are in bfloat16, and a sum over ranks rounds in another place.
    for make, tolerance in ((partial(MuonWithAdamW, lr=0.02), 0.1), (partial(SGDScheduleFree, lr=0.1), 1e-4)):
        try_optimizer(make, torch.device("cpu"), mesh)
        expected, found = after_three_steps(make), after_three_steps(make, mesh)
        assert (found - expected).norm() < tolerance * (expected - start).norm(), make
    try:
        try_optimizer(torch.optim.Adafactor, torch.device("cpu"), mesh)
    except UserError as error:
        assert "Adafactor is not supported: it cannot make a step" in str(error)
    else:
        raise AssertionError("Adafactor of sharded weights was not refused")
