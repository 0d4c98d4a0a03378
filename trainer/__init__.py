"""Store and recipe to checkpoints to model. `config`, `ds_config` and `plan` never import torch or deepspeed."""
