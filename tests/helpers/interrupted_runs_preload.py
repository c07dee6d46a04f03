"""What runs import, imported once: in the server that they are forked from."""

import datasets  # noqa: F401
import lightning.pytorch  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401

import tealightning.cli.training  # noqa: F401
