"""Push weights to a vLLM server: through a file that both sides see, or NCCL between GPUs."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from safetensors.torch import save_file
from torch import Tensor

from tealightning.errors import UserError
from tealightning.rollouts.vllm import nccl_sender
from tealightning.rollouts.vllm_client import VLLMClient

Weights = list[tuple[str, Tensor]]

_MEMORY = "/dev/shm"
_PREFIX = "tealightning-weights-"


class FilePush:
    """Pushes weights through a safetensors file, which the server loads and this removes again.

    Args:
        parent: An existing folder at the same path for trainer and server, for example on a network file system. None =
            memory (`/dev/shm`) where there is such a thing, for a server on this machine.
    """

    def __init__(self, parent: str | None) -> None:
        is_local = parent is None
        parent = parent or (_MEMORY if os.access(_MEMORY, os.W_OK) else tempfile.gettempdir())
        if not os.path.isdir(parent):
            raise UserError(f"rollout.engine.weights_dir must be an existing folder, got {parent}.")
        if is_local:
            remove_abandoned(Path(parent))
        self._temporary = tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=os.path.abspath(parent))
        self.folder = Path(self._temporary.name)
        self._lock: int | None = os.open(self.folder, os.O_RDONLY)  # the kernel gives it back however this process ends
        with contextlib.suppress(OSError):  # a network file system
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def push(self, client: VLLMClient, weights: Weights, *, checked: bool = False) -> list[str]:
        """The server's parameters that `weights` left behind; known only if `checked`, which needs its extension."""
        needed, free = sum(tensor.nbytes for _, tensor in weights), shutil.disk_usage(self.folder).free
        if needed > free:
            raise UserError(
                f"rollout.engine.weights_dir: the weights take {needed / 2**30:.2f} GiB and {self.folder.parent} has "
                f"{free / 2**30:.2f} GiB left. Name a folder on another file system, or give /dev/shm more memory."
            )
        path, partial = self.folder / "model.safetensors", self.folder / "model.partial"
        try:
            save_file(_separate(weights), partial)
            partial.replace(path)  # the server never sees half a file
            if checked:
                return client.load_checkpoint(self.folder)
            client.reload_weights(self.folder)
            return []
        finally:
            partial.unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._temporary.cleanup()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_abandoned(parent: Path) -> None:
    """Remove folders of weights that killed processes have left: those that nobody has locked for a minute."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or in use
            handle = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if time.time() - folder.stat().st_mtime > 60.0:  # else it is just being made
                    shutil.rmtree(folder)
            finally:
                os.close(handle)


class NCCLPush:
    """vLLM's own NCCL weight transfer: the trainer's GPU broadcasts to every GPU of the server.

    Needs a GPU that the server does not use, `vllm` installed beside the trainer, and a server started with
    `--weight-transfer-config '{"backend": "nccl"}'`; `host` is the address of this machine for the server's workers.
    """

    def __init__(self, device: torch.device, host: str) -> None:
        if device.type != "cuda":
            raise UserError(
                f"rollout.engine.weight_transfer=nccl needs the policy on an NVIDIA GPU, it is on {device}: use file."
            )
        self.device = device
        self.host = host
        self._sender: Any = None
        self._weights: Weights = []  # what the sender's next round reads

    def push(self, client: VLLMClient, weights: Weights, *, checked: bool = False) -> list[str]:
        """vLLM's transfer does not say what was loaded, `checked` or not: the log-probs are compared after it."""
        self._weights = weights
        with torch.cuda.device(self.device):
            if self._sender is None:
                world_size = 1 + client.world_size()
                self._sender = nccl_sender(
                    client,
                    lambda: self._weights,
                    host=self.host,
                    port=find_free_network_port(),
                    world_size=world_size,
                )
            self._sender.send_weights()
        self._weights = []
        return []

    def close(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
        self._sender = None


def _separate(weights: Weights) -> dict[str, Tensor]:
    """`weights` as the format wants them: contiguous and with memory of their own, also where they are tied."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights:
        tensor = tensor.contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors
