"""`python run_module.py MODULE …` is `python -m MODULE …`, for DeepSpeed's launchers that start files only."""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as with -m; it was the folder of this file
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
