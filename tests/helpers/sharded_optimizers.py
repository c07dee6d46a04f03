"""One rank of two: optimizers on weights that FSDP2 shards make the steps that they make on whole ones."""

from functools import partial

import torch
import torch.distributed as dist
from module_fixtures import tiny_llama
from schedule_free import SGDScheduleFree
from torch.distributed.device_mesh import init_device_mesh

from tealightning.errors import UserError
from tealightning.training.optimizers import MuonWithAdamW, build_optimizer, try_optimizer
from tealightning.training.policy_weights import shard, whole


def after_three_steps(make, mesh=None):
    model = tiny_llama()
    if mesh is not None:
        shard(model, mesh)
    optimizer = build_optimizer(make, model)
    ids = torch.arange(24).view(2, 12)
    for _ in range(3):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return torch.cat([whole(p.detach()).flatten() for p in model.parameters()])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    start = torch.cat([p.detach().flatten() for p in tiny_llama().parameters()])
    make = partial(MuonWithAdamW, lr=0.02)
    try_optimizer(make, torch.device("cpu"), mesh)
    expected, found = after_three_steps(make), after_three_steps(make, mesh)
    # Muon's products are in bfloat16, and a sum over ranks rounds in another place.
    assert (found - expected).norm() < 0.1 * (expected - start).norm()
    refused = {torch.optim.Adafactor: "cannot make a step", SGDScheduleFree: "with sharded weights"}
    for cls, told in refused.items():
        try:
            try_optimizer(cls, torch.device("cpu"), mesh)
        except UserError as error:
            assert f"{cls.__name__} is not supported" in str(error) and told in str(error)
        else:
            raise AssertionError(f"{cls.__name__} of sharded weights was not refused")
