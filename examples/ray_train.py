"""A run on Ray's workers: each is one rank of the process group that Ray makes. `pip install 'ray[train]'`

python examples/ray_train.py demo zero1 2 duration.steps=100
"""

import os
import sys

from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

import zeropipe


def rank(job: dict) -> None:
    os.chdir(job["folder"])  # Ray starts its workers elsewhere; stores and runs are where you are
    zeropipe.train(zeropipe.load_recipe(job["recipe"], job["overrides"]), job["ds"])


def main(recipe: str, ds: str, workers: str, *overrides: str) -> None:
    folder = os.getcwd()
    job = {"folder": folder, "recipe": recipe, "ds": ds, "overrides": overrides}
    scaling = ScalingConfig(num_workers=int(workers), use_gpu="USE_GPU" in os.environ)
    storage = RunConfig(storage_path=os.path.join(folder, "ray"))
    TorchTrainer(rank, train_loop_config=job, scaling_config=scaling, run_config=storage).fit()
    run = zeropipe.open_run(zeropipe.load_recipe(recipe, overrides).output)
    print(f"{run.path}: loss {run.metrics()['loss'].to_pylist()[-1]:.4f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
