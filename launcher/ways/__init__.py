"""Other ways to start the same ranks: what Slurm, torchrun and Kubeflow are given to run."""
