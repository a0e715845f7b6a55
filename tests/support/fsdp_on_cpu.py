"""Run a script with FSDP on CPU processes. By itself, accelerate silently ignores FSDP there.

accelerate launch --config_file fsdp2.yaml tests/support/fsdp_on_cpu.py script.py ...
"""

import runpy
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

init = PartialState.__init__


def init_as_on_gpus(self, *args, **kwargs) -> None:
    init(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = init_as_on_gpus
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
