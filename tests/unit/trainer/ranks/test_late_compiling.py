import subprocess
import sys

from zeropipe.trainer.ranks.late_compiling import LateCompile

MUON = """
import sys
import zeropipe.trainer.modeling.derived.shapes  # as `plan` does for a family without a written record
assert "deepspeed" not in sys.modules
from zeropipe.trainer.ranks.ranks import prepare_backend
prepare_backend()
prepare_backend()
from deepspeed.runtime import compiler
import deepspeed.runtime.zero.muon.muon_optimizer
from deepspeed.runtime.zero.muon import original_muon
print("torch._inductor.compile_fx" in sys.modules, original_muon.zeropower_via_newtonschulz5.__name__)
"""


def test_a_run_without_muon_does_not_load_the_compiler():
    done = subprocess.run([sys.executable, "-c", MUON], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1:] == ["False zeropower_via_newtonschulz5"], done.stderr


def test_what_is_called_is_compiled_once():
    compiled = []

    def make():
        def compile_it(function):
            compiled.append(function)
            return lambda *values, **named: 10 * function(*values, **named)

        return compile_it

    @LateCompile(make)()
    def both(first, second=1):
        return first + second

    assert compiled == []
    assert (both(1), both(1, second=2)) == (20, 30)
    assert len(compiled) == 1
