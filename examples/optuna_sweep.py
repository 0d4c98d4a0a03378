"""A sweep over learning rate and weight decay by Optuna, a run for each trial. `pip install optuna`

python examples/optuna_sweep.py demo zero1 2 10 duration.steps=100
"""

import sys

import optuna

import zeropipe


def main(recipe: str, ds: str, devices: str, trials: str, *overrides: str) -> None:
    def held_out_loss(trial: optuna.Trial) -> float:
        chosen = {
            "optimizer.lr": trial.suggest_float("lr", 1e-4, 1e-2, log=True),
            "optimizer.weight_decay": trial.suggest_float("weight_decay", 0.0, 0.2),
            "output": f"runs/sweep/{trial.number}",
        }
        own = [*overrides, *(f"{key}={value}" for key, value in chosen.items())]
        run = zeropipe.train(zeropipe.load_recipe(recipe, own), ds, int(devices))
        return run.metrics("eval")["loss"].to_pylist()[-1]

    study = optuna.create_study(direction="minimize")
    study.optimize(held_out_loss, n_trials=int(trials))
    print(f"best: {study.best_value:.4f} with {study.best_params}; all of them: zeropipe watch runs/sweep")


if __name__ == "__main__":
    main(*sys.argv[1:])
